"""Examples at random times: by the keys of each, in any family."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from masked import MASK, Masked

from jax_ddpm.diffusion.family import Gaussian
from jax_ddpm.diffusion.process import noise_between
from jax_ddpm.diffusion.processes import make_process
from jax_ddpm.diffusion.time_sampling import LossSecondMoment, Stratified, Uniform
from jax_ddpm.keys import StepKeys
from jax_ddpm.tasks.noising import by_quarter, noised

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

CHAIN = make_process("cosine", num_timesteps=8)
FAMILIES = {"gaussian": (Gaussian(CHAIN), 0.5), "masked": (Masked(8), 1)}
KEYS = StepKeys(jax.random.key(0), jnp.int32(3), jnp.arange(16), 16)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_example_depends_on_its_own_keys(name):
    family, value = FAMILIES[name]
    x0 = jnp.full((16, 2, 3), value)
    draw = jax.jit(partial(noised, family, Stratified(8), (), step=KEYS.step))
    some = jnp.array([11, 2])
    everything, part = draw(x0=x0, keys=KEYS), draw(x0=x0[some], keys=KEYS.take(some))
    jax.tree.map(np.testing.assert_array_equal, part, jax.tree.map(lambda a: a[some], everything))
    assert everything.t.dtype == jnp.float32
    assert everything.xt.dtype == x0.dtype
    np.testing.assert_array_equal(np.sort(everything.t), np.repeat(np.arange(8), 2))


def test_noise_is_what_the_family_tells():
    x0 = jnp.full((16, 2), 0.5)
    t, _, xt, eps = noised(Gaussian(CHAIN), Stratified(8), (), x0, KEYS, KEYS.step)
    np.testing.assert_allclose(noise_between(CHAIN, x0, xt, t), eps, rtol=1e-4, atol=1e-5)
    x0 = jnp.ones((16, 2), jnp.int32)
    _, _, xt, hidden = noised(Masked(8), Stratified(8), (), x0, KEYS, KEYS.step)
    np.testing.assert_array_equal(xt == MASK, hidden)


@pytest.mark.parametrize("sampler", [Uniform(8), LossSecondMoment(8, length=1)])
def test_the_mean_of_a_quarter_is_over_its_times_however_often_each_is_drawn(sampler):
    """The value is t; the losses kept are 0, 1, …, 7, so that t = 7 is drawn most."""
    size, state = 8000, sampler.init()
    if state:
        state = state._replace(losses=jnp.arange(8.0)[:, None], counts=jnp.ones(8, jnp.int32))
    keys = StepKeys(jax.random.key(0), jnp.int32(3), jnp.arange(size), size)
    drawn = noised(Gaussian(CHAIN), sampler, state, jnp.zeros((size, 1)), keys, keys.step)
    for i, (values, weights) in enumerate(by_quarter("t", drawn.t, drawn, sampler).values()):
        if i or not state:  # t = 0 is hardly ever drawn by its loss of 0
            np.testing.assert_allclose(values.sum() / weights.sum(), 2 * i + 0.5, atol=0.1)
    assert list(by_quarter("t", drawn.t, drawn, sampler)) == [f"t_quarter{i}" for i in (1, 2, 3, 4)]
