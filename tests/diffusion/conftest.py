"""The mathematics is tested under strict dtype promotion: no silent float64 or int mixing."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.process import q_sample
from jax_ddpm.diffusion.schedules import SCHEDULES, make_betas


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def x64():
    """The library runs in x's dtype, so that exactness is measured in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session", params=SCHEDULES)
def chain(request):
    """The chain of T = 1000 under every schedule."""
    return Chain(make_betas(request.param, 1000))


class Points(NamedTuple):
    """One example of three dimensions at every t of a chain, in float64."""

    x0: jax.Array
    eps: jax.Array
    xt: jax.Array
    t: jax.Array


@pytest.fixture
def points(chain, rng, x64):
    t = jnp.arange(chain.num_timesteps, dtype=float)
    x0, eps = jnp.asarray(rng.standard_normal((2, chain.num_timesteps, 3)))
    return Points(x0, eps, q_sample(chain, x0, t, eps), t)
