"""Langevin steps between ancestral ones, on Gaussian data, where they are known in closed form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from exact import GaussianDenoiser

from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.continuous import edm, rectified_flow
from jax_ddpm.diffusion.process import fold_in, per_example_normal
from jax_ddpm.diffusion.samplers.ancestral import ancestral
from jax_ddpm.diffusion.samplers.grid import karras, to_clean, uniform
from jax_ddpm.diffusion.samplers.predictor_corrector import predictor_corrector
from jax_ddpm.diffusion.samplers.scan import sample
from jax_ddpm.diffusion.schedules import make_betas

pytestmark = pytest.mark.usefixtures("x64")
quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

MEAN, VAR = 0.3, 0.25
CHAIN, EDM = Chain(make_betas("linear", 100)), edm()


def run(sampler, process, x):
    """The samples, as a NumPy array."""
    keys = jax.random.split(jax.random.key(0), len(x))
    denoiser = GaussianDenoiser(MEAN, VAR, process)
    return np.asarray(jax.jit(partial(sample, sampler))(denoiser, jnp.asarray(x), keys, {})[0])


def rows(sampler, start, stop, repeats=1):
    """The sampler with some of its rows alone, over and over."""

    def kept(column):
        return np.tile(column[start:stop], repeats)

    return sampler._replace(nodes=jax.tree.map(kept, sampler.nodes))


def draws(x, num_rows):
    keys = jax.random.split(jax.random.key(0), len(x))
    return [
        np.asarray(per_example_normal(fold_in(keys, i), jnp.asarray(x))) for i in range(num_rows)
    ]


def score(x, alpha, sigma):
    """∇log q(x_t)."""
    return -(x - alpha * MEAN) / (alpha**2 * VAR + sigma**2)


def langevin(x, z, alpha, sigma, snr, kept):
    """Algorithms 4 (kept = 1) and 5 (kept = 1 - β) of Song et al. 2021, a norm per example."""
    gradient = score(x, alpha, sigma)
    norms = [np.linalg.norm(each, axis=1, keepdims=True) for each in (z, gradient)]
    size = 2 * kept * (snr * norms[0] / norms[1]) ** 2
    return x + size * gradient + np.sqrt(2 * size) * z


def test_steps_in_a_chain_are_the_papers(rng):
    """The predictor is Ho et al. 2020, eqs. 6-7, with x̂_0 = (x_t + σ²·score)/α."""
    x, snr, times = rng.standard_normal((4, 3)), 0.2, np.array([99, 60, 20, 0])
    sampler = predictor_corrector(to_clean(CHAIN, times.astype(float)), snr, corrector_steps=2)
    z = iter(draws(x, 12))
    alpha_bar = np.cumprod(1 - CHAIN.betas)[times]
    expected = x
    for now, after in zip(alpha_bar, np.append(alpha_bar[1:], 1), strict=True):
        alpha, sigma, beta = np.sqrt(now), np.sqrt(1 - now), 1 - now / after
        for _ in range(2):
            expected = langevin(expected, next(z), alpha, sigma, snr, 1 - beta)
        x0 = (expected + sigma**2 * score(expected, alpha, sigma)) / alpha
        mean = np.sqrt(after) * beta / (1 - now) * x0
        mean += np.sqrt(1 - beta) * (1 - after) / (1 - now) * expected
        expected = mean + np.sqrt(beta * (1 - after) / (1 - now)) * next(z)
    np.testing.assert_allclose(run(sampler, CHAIN, x), expected, rtol=1e-10)


def test_steps_where_variance_explodes_are_the_papers(rng):
    """The predictor is theirs too: x + (σ_t²-σ_s²)·score + √(σ_s²·(σ_t²-σ_s²)/σ_t²)·z (eq. 47)."""
    x, snr, sigmas = 80 * rng.standard_normal((4, 3)), 0.1, karras(EDM, 5)
    z = iter(draws(x, 10))
    expected = x
    for now, after in zip(sigmas, np.append(sigmas[1:], 0), strict=True):
        expected = langevin(expected, next(z), 1.0, now, snr, 1.0)
        beta = now**2 - after**2
        expected = expected + beta * score(expected, 1.0, now)
        expected += np.sqrt(beta * after**2 / now**2) * next(z)
    actual = run(predictor_corrector(to_clean(EDM, sigmas), snr), EDM, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-10)


def test_without_corrector_is_ancestral(rng):
    x, grid = rng.standard_normal((4, 3)), to_clean(CHAIN, uniform(CHAIN, 6))
    plain = predictor_corrector(grid, corrector_steps=0)
    assert plain.num_evaluations == 6
    expected = run(ancestral(grid, "fixedsmall"), CHAIN, x)
    np.testing.assert_allclose(run(plain, CHAIN, x), expected, rtol=1e-11)


@pytest.mark.parametrize("snr", [0.4, 0.6])
def test_corrector_settles_at_the_marginal(rng, snr):
    """It settles, from anywhere, at the mean α·m and, in many dimensions, at 1 + snr² times V, the
    variance of q(x_t).

    There ‖z‖² is d and ‖score‖² is d·W/V² at variance W of x, so that δ = 2·snr²·V²/W, and
    W = (1-δ/V)²·W + 2δ is W = (1 + snr²)·V.
    """
    sigma, count, dims = 1.5, 100, 1000
    sampler = predictor_corrector(to_clean(EDM, np.array([sigma, 0.5])), snr)
    x = 5 + 3 * rng.standard_normal((count, dims))
    samples = run(rows(sampler, 0, 1, repeats=60), EDM, x)
    variance = (1 + snr**2) * (VAR + sigma**2)
    mean_error, relative_error = np.sqrt(variance / samples.size), np.sqrt(2 / samples.size)
    np.testing.assert_allclose(samples.mean(), MEAN, atol=4 * mean_error)
    np.testing.assert_allclose(samples.var(), variance, rtol=4 * relative_error)


def test_corrector_mends_the_predictors_variance(rng):
    """The variance β̃ shrinks the data by much in few steps."""
    x, grid = rng.standard_normal((100, 64)), to_clean(CHAIN, uniform(CHAIN, 20))

    def shrinkage(corrector_steps):
        return 1 - run(predictor_corrector(grid, 0.16, corrector_steps), CHAIN, x).var() / VAR

    assert 0 < shrinkage(5) < shrinkage(0) / 3


def test_corrector_rests_where_there_is_no_signal(rng):
    """1-β of a step from α = 0 is 0."""
    process, x = rectified_flow(), rng.standard_normal((4, 3))
    sampler = predictor_corrector(to_clean(process, uniform(process, 4)), corrector_steps=2)
    np.testing.assert_array_equal(run(rows(sampler, 0, 2), process, x), x)


@pytest.mark.parametrize(("snr", "corrector_steps"), [(0.0, 1), (-0.1, 1), (np.nan, 1), (0.1, -1)])
def test_refuses_what_is_out_of_range(snr, corrector_steps):
    with pytest.raises(ValueError, match=r"(snr|corrector_steps) is .*; it must be "):
        predictor_corrector(to_clean(CHAIN, uniform(CHAIN, 4)), snr, corrector_steps)
