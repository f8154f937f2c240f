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
from jax_ddpm.diffusion.time_sampling import Stratified
from jax_ddpm.keys import StepKeys
from jax_ddpm.tasks.noising import noised

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
