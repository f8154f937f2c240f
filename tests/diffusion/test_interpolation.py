"""Encode two images at t, mix, decode: with a Gaussian denoiser, affine in everything."""

import jax
import numpy as np
import pytest
from exact import GaussianDenoiser

from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.interpolation import interpolate
from jax_ddpm.diffusion.samplers.ancestral import ancestral
from jax_ddpm.diffusion.samplers.grid import to_clean
from jax_ddpm.diffusion.schedules import make_betas

pytestmark = pytest.mark.usefixtures("x64")

CHAIN = Chain(make_betas("linear", 100))
VAR, T = 0.25, 60
SAMPLER = ancestral(to_clean(CHAIN, np.arange(T, -1, -1, dtype=float)), "fixedsmall")


@pytest.fixture
def pair(rng):
    return rng.uniform(-1, 1, (2, 4, 4, 1))


WEIGHTS = np.array([0.0, 0.3, 0.3, 0.8, 1.0])
W = WEIGHTS.reshape(-1, 1, 1, 1)


@jax.jit
def decode(pair, weights, key):
    denoiser = GaussianDenoiser(0.3, VAR, CHAIN)
    return interpolate(SAMPLER, denoiser, CHAIN, pair, weights, key, {})


def row(pair, weights=WEIGHTS, seed=0):
    """The decoded mixtures of a pair of images."""
    return np.asarray(decode(pair, weights, jax.random.key(seed)))


def test_is_affine_in_the_weight(pair):
    """Encoding and sampling noise are shared along the row, so that w alone varies."""
    x = row(pair)
    np.testing.assert_allclose(x, (1 - W) * x[0] + W * x[-1], atol=1e-13)
    np.testing.assert_array_equal(x[1], x[2])
    assert np.all(x[0] != x[-1])


def test_each_end_is_one_image_decoded(pair):
    """w = 0 knows nothing of the second image, w = 1 nothing of the first."""
    x = row(pair)
    for image, other_end in ((0, -1), (1, 0)):
        changed = pair.copy()
        changed[image] += 1
        differs = row(changed) != x
        assert not np.any(differs[other_end])
        assert np.all(np.delete(differs, other_end, axis=0))


def test_the_mixture_is_encoded_at_t_and_decoded_from_t(pair):
    """The images enter as √ᾱ_t·((1-w)·x_0 + w·x'_0), scaled by the slope of each step after."""
    beta, alpha_bar = CHAIN.betas[: T + 1], np.cumprod(1 - CHAIN.betas[: T + 1])
    previous = np.append(1, alpha_bar[:-1])
    gain = np.sqrt(alpha_bar) * VAR / (alpha_bar * VAR + 1 - alpha_bar)
    slope = (np.sqrt(previous) * beta * gain + np.sqrt(1 - beta) * (1 - previous)) / (1 - alpha_bar)
    expected = np.sqrt(alpha_bar[-1]) * np.prod(slope) * ((1 - W) * pair[0] + W * pair[1])
    np.testing.assert_allclose(row(pair) - row(0 * pair), expected, atol=1e-12)


def test_noise_is_drawn_per_image_and_from_the_key(pair):
    blank = row(0 * pair)
    assert np.all(blank[0] != blank[-1]), "each of the two encodings has a noise of its own"
    assert np.all(blank != row(0 * pair, seed=1))


def test_a_weight_does_not_depend_on_its_row(pair):
    other = np.array([0.6, 0.1, 0.5, 0.8, 0.9])
    np.testing.assert_array_equal(row(pair, other)[3], row(pair)[3])
