"""Clipped Adam beside optax's, and what it does where it shall do nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_ddpm.tasks.adam import clipped_adam

PARAMS = {"a": jnp.array([3.0, -1.0, 0.5]), "b": {"c": jnp.ones((2, 2))}}


def gradients(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(0.2, 1, p.shape), p.dtype), PARAMS)


@pytest.mark.parametrize("max_norm", [0.5, 2.5, 100.0])
@pytest.mark.parametrize(("b1", "b2", "eps"), [(0.9, 0.999, 1e-8), (0.0, 0.9, 1e-2)])
def test_agrees_with_optax(max_norm, b1, b2, eps):
    schedule = optax.linear_schedule(0.0, 0.1, 10)
    ours = clipped_adam(schedule, b1, b2, eps, max_norm)
    theirs = optax.chain(optax.clip_by_global_norm(max_norm), optax.adam(schedule, b1, b2, eps))
    mine, other = ours.init(PARAMS), theirs.init(PARAMS)

    @jax.jit
    def both(gradient, mine, other):
        norm = optax.tree.norm(gradient)
        update, mine = ours.update(gradient, mine, norm=norm, finite=True)
        expected, other = theirs.update(gradient, other)
        return update, expected, mine, other

    for step in range(30):
        update, expected, mine, other = both(gradients(step), mine, other)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-4, 1e-7), update, expected)


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_where_not_finite_nothing_changes(steps_before, bad):
    optimiser = clipped_adam(lambda step: 0.1, 0.9, 0.999, 1e-8, 1.0)
    state = optimiser.init(PARAMS)
    for step in range(steps_before):
        _, state = optimiser.update(gradients(step), state, norm=1.0, finite=True)
    spoilt = jax.tree.map(lambda g: g.at[0].set(bad), gradients(9))
    updates, after = optimiser.update(spoilt, state, norm=bad, finite=False)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert all(np.all(update == 0) for update in jax.tree.leaves(updates))
