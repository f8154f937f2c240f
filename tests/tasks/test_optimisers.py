"""Every optimiser behind the gate: optax's own, and nothing where something is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jax_ddpm.config.validation import validate
from jax_ddpm.errors import UserError
from jax_ddpm.tasks.optimisers import OPTIMISERS
from jax_ddpm.tasks.recipe import make_phase

PARAMS = {"a": jnp.array([3.0, -1.0, 0.5]), "b": {"c": jnp.ones((2, 2))}}
MAX_NORM = 2.5


class Nothing:
    """No objective is asked here."""

    def init(self):
        return ()

    def __call__(self, params, extra, batch, keys, step):
        raise NotImplementedError


OBJECTIVE = Nothing()


def gradients(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(0.2, 1, p.shape), p.dtype), PARAMS)


@pytest.fixture(params=OPTIMISERS)
def name(request):
    return request.param


def test_is_the_published_one_on_clipped_gradients(name):
    schedule = optax.linear_schedule(0.0, 0.1, 10)
    published = {"adam": optax.adam, "adamw": optax.adamw, "radam": optax.radam}[name]
    options = {"weight_decay": 0.01} if name == "adamw" else {}
    theirs = optax.chain(optax.clip_by_global_norm(MAX_NORM), published(schedule, **options))
    ours = OPTIMISERS[name](schedule, MAX_NORM)
    mine, other = ours.init(PARAMS), theirs.init(PARAMS)
    for step in range(12):
        g = gradients(step)
        update, mine = ours.update(g, mine, PARAMS, norm=optax.tree.norm(g), finite=True)
        expected, other = theirs.update(g, other, PARAMS)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-4, 1e-7), update, expected)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_where_not_finite_nothing_changes(name, bad):
    optimiser = OPTIMISERS[name](lambda step: 0.1, MAX_NORM)
    state = optimiser.init(PARAMS)
    for step in range(3):
        _, state = optimiser.update(gradients(step), state, PARAMS, norm=1.0, finite=True)
    spoilt = jax.tree.map(lambda g: g.at[0].set(bad), gradients(9))
    updates, after = optimiser.update(spoilt, state, PARAMS, norm=bad, finite=False)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert all(np.all(update == 0) for update in jax.tree.leaves(updates))


def test_is_chosen_by_the_config(name):
    """Weight decay shrinks what has no gradient; the two others leave it."""
    config = tiny.config(training__optimiser=name, training__learning_rate=0.5)
    validate(config, 1)
    phase = make_phase(config, OBJECTIVE, ("network",))
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    state = phase.optimiser.init(PARAMS)
    update, _ = phase.optimiser.update(zeros, state, PARAMS, norm=1.0, finite=True)
    expected = -0.5 * 0.01 if name == "adamw" else 0
    jax.tree.map(lambda u, p: np.testing.assert_allclose(u, expected * p, 1e-6), update, PARAMS)


def test_an_option_of_another_one_is_refused():
    with pytest.raises(UserError, match=r"^config.training.weight_decay is 0.1; .*adam$"):
        validate(tiny.config(training__weight_decay=0.1), 1)


@pytest.mark.parametrize("every", [1, 4])
def test_schedules_count_training_steps(every):
    """Adam without memory moves by the learning rate: that of the step at which the phase runs."""
    config = tiny.config(training__warmup_steps=20, training__adam_b1=0.0, training__adam_b2=0.0)
    phase = make_phase(config, OBJECTIVE, ("network",), learning_rate=0.2, every=every)
    state = phase.optimiser.init(PARAMS)
    for step in range(0, 12, every):
        rate = 0.2 * step / 20
        assert float(phase.learning_rate(step)) == pytest.approx(rate)
        ones = jax.tree.map(jnp.ones_like, PARAMS)
        update, state = phase.optimiser.update(ones, state, PARAMS, norm=1.0, finite=True)
        jax.tree.map(lambda u, r=rate: np.testing.assert_allclose(u, -r, 1e-5), update)
