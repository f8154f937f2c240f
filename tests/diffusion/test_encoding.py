"""Images to noise and back along the probability-flow ODE, of Gaussian data in closed form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from exact import GaussianDenoiser

from jax_ddpm.diffusion.continuous import edm, rectified_flow, vp_cosine
from jax_ddpm.diffusion.encoding import decode, encode, spherical
from jax_ddpm.diffusion.samplers.ddim import ddim
from jax_ddpm.diffusion.samplers.heun import heun

pytestmark = pytest.mark.usefixtures("x64")
quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

PROCESSES = {"vp_cosine": vp_cosine(), "edm": edm(), "rectified_flow": rectified_flow()}
ORDERS = {ddim: 1, heun: 2}
MEAN, VAR = 0.3, 0.2


@pytest.fixture(params=PROCESSES)
def process(request):
    return PROCESSES[request.param]


@pytest.fixture
def images(rng):
    return jnp.asarray(rng.uniform(-1, 1, (3, 2, 2, 1)))


def rising(process, num_times):
    """Times with λ evenly spaced from 5 to -5."""
    return process.time(np.linspace(5, -5, num_times))


def there(solver, process, images, num_times, way=encode):
    denoiser, times = GaussianDenoiser(MEAN, VAR, process), rising(process, num_times)
    return np.asarray(jax.jit(partial(way, solver, process, times))(denoiser, images, {}))


def along_the_flow(process, images):
    """(x - α·m)/√(α²·v + σ²) does not change along the ODE of N(m, v)."""
    alpha, sigma = (f(rising(process, 2)) for f in (process.alpha, process.sigma))
    std = np.sqrt(alpha**2 * VAR + sigma**2)
    return alpha[1] * MEAN + std[1] * alpha[0] * (np.asarray(images) - MEAN) / std[0]


@pytest.mark.parametrize("solver", ORDERS)
def test_encodes_to_where_the_ode_leads_at_the_solvers_order(process, images, solver):
    expected = along_the_flow(process, images)
    coarse, fine = (
        np.abs(there(solver, process, images, n + 1) - expected).max() for n in (40, 80)
    )
    assert coarse > 1e-6
    np.testing.assert_allclose(np.log2(coarse / fine), ORDERS[solver], atol=0.15)


@pytest.mark.parametrize("solver", ORDERS)
def test_decodes_to_the_images_at_the_solvers_order(process, images, solver):
    errors = []
    for num_steps in (40, 80):
        noise = there(solver, process, images, num_steps + 1)
        back = there(solver, process, jnp.asarray(noise), num_steps + 1, decode)
        errors.append(np.abs(back - images).max())
    assert errors[1] < 0.05
    assert np.log2(errors[0] / errors[1]) > ORDERS[solver] - 0.15


def test_length_is_kept_along_the_sphere(rng):
    """The angle grows evenly with the weight."""
    pair = rng.standard_normal((2, 4, 4, 1))
    pair /= np.sqrt(np.sum(pair**2, axis=(1, 2, 3), keepdims=True))
    weights = np.array([0.0, 0.2, 0.5, 0.9, 1.0])
    row = np.asarray(spherical(jnp.asarray(pair), jnp.asarray(weights))).reshape(5, -1)
    np.testing.assert_allclose(np.linalg.norm(row, axis=1), 1, rtol=1e-12)
    first, second = pair.reshape(2, -1)
    angle = np.arccos(first @ second)
    np.testing.assert_allclose(row[1:] @ first, np.cos(weights[1:] * angle), atol=1e-12)
    np.testing.assert_allclose(row[:-1] @ second, np.cos((1 - weights[:-1]) * angle), atol=1e-12)
    np.testing.assert_allclose(row[[0, -1]], [first, second], atol=1e-14)


def test_midway_between_orthogonal_noises_is_their_scaled_sum():
    """Their lengths do not matter: only the angle between them counts."""
    pair = jnp.array([[3.0, 0.0], [0.0, 1.0]])
    found = spherical(pair, jnp.array([0.5]))
    np.testing.assert_allclose(found, np.array([[3, 1]]) / np.sqrt(2), rtol=1e-14)
