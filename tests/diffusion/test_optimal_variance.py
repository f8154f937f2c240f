"""The optimal variance of Gaussian data, where all of it is known in closed form.

What x_t leaves unknown of x_0, the statistic E‖x_0 - x̂_0‖²/d, is its posterior variance
v·σ²/(α²v + σ²).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from exact import GaussianDenoiser

from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.continuous import edm, rectified_flow, ve, vp_cosine
from jax_ddpm.diffusion.optimal_variance import (
    X0Error,
    optimal_variance,
    visited_times,
    x0_error,
)
from jax_ddpm.diffusion.process import ALL_NOISE
from jax_ddpm.diffusion.samplers.ancestral import ancestral
from jax_ddpm.diffusion.samplers.grid import GRIDS, along, to_clean
from jax_ddpm.diffusion.schedules import make_betas, zero_terminal_snr

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

MEAN, VAR = 0.3, 0.25
HELD = np.exp(ALL_NOISE)  # relative error of what is unknown, held below that λ
PROCESSES = {
    "linear": Chain(make_betas("linear", 1000)),
    "cosine": Chain(make_betas("cosine", 100)),
    "zero_terminal_snr": Chain(zero_terminal_snr(make_betas("linear", 100))),
    "vp_cosine": vp_cosine(),
    "ve": ve(0.03, 20.0),
    "edm": edm(),
    "rectified_flow": rectified_flow(),
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def exact_error(process, times, var=VAR):
    """The statistic at these times and where little is left of x_0, by rising λ."""
    log_snr = np.append(process.log_snr(times), ALL_NOISE)
    log_snr = np.unique(np.maximum(log_snr, ALL_NOISE))
    return X0Error(log_snr, var / (np.exp(log_snr) * var + 1))


class TestVisitedTimes:
    @every_process
    def test_reach_from_the_least_noise_to_where_all_is_noise(self, process):
        times = visited_times(process)
        log_snr = process.log_snr(times)
        low, high = process.log_snr(np.array(process.time_range)[::-1])
        assert np.all(log_snr >= ALL_NOISE - 1e-9)
        np.testing.assert_allclose(log_snr.max(), high, rtol=1e-9)
        if process.num_timesteps:
            np.testing.assert_array_equal(times, np.arange(len(times)))
            following = process.log_snr(np.array([float(len(times))]))[0]
            assert len(times) == process.num_timesteps or following < ALL_NOISE
        else:
            np.testing.assert_allclose(log_snr.min(), max(low, ALL_NOISE), rtol=1e-9)
            assert len(times) >= 100


class TestX0Error:
    """Means over 400 draws of 64 dimensions, to what their spread allows."""

    size = 400

    @pytest.fixture
    def x0(self, rng):
        return jnp.asarray(MEAN + VAR**0.5 * rng.standard_normal((self.size, 8, 8)), jnp.float32)

    @pytest.fixture
    def keys(self, x0):
        return jax.random.split(jax.random.key(0), len(x0))

    @staticmethod
    def measure(process, x0, times, keys, order=slice(None)):
        denoiser = GaussianDenoiser(MEAN, VAR, process)
        run = jax.jit(lambda x0, t, keys: x0_error(process, denoiser, x0, t, keys, {}))
        return np.asarray(run(x0[order], jnp.asarray(times, jnp.float32), keys[order]))

    @every_process
    def test_is_that_of_the_exact_prediction(self, process, x0, keys):
        """The rest is normal, so the relative error of the mean of its n squares is √(2/n)."""
        low, high = process.time_range
        times = np.round(np.linspace(high, low, 5)) if high > 1 else np.linspace(high, low, 5)
        times = np.clip(times, low, high)
        error = self.measure(process, x0, times, keys)
        assert error.shape == (5, self.size)
        alpha, sigma = process.alpha(times), process.sigma(times)
        expected = VAR * sigma**2 / (alpha**2 * VAR + sigma**2)
        np.testing.assert_allclose(error.mean(axis=1), expected, rtol=5 * np.sqrt(2 / x0.size))

    def test_of_an_example_does_not_depend_on_the_others(self, x0, keys):
        process, times = PROCESSES["linear"], [900, 500, 10]
        order = np.array([7, 2, 399])
        whole, part = (self.measure(process, x0, times, keys, o) for o in (slice(None), order))
        np.testing.assert_allclose(part, whole[:, order], rtol=1e-5)

    def test_noise_is_fresh_at_every_time(self, x0, keys):
        """The error at low noise is that noise; the same noise at all times would make it one."""
        error = self.measure(PROCESSES["linear"], x0, [3, 2, 1, 0], keys)
        correlation = np.corrcoef(error)[np.triu_indices(4, 1)]
        assert np.all(np.abs(correlation) < 5 / np.sqrt(self.size))


def moments_on_the_way(grid, variance, mean, var):
    """Mean and variance after every step, from the exact marginal at the start.

    Each step x_s = c_0·x̂_0 + c_t·x_t + σ*·z is affine, with x̂_0 = E[x_0 | x_t].
    """
    nodes, now = ancestral(grid, variance).nodes, grid.now
    std = nodes.noise * np.exp(nodes.log_variance / 2)
    current = now.alpha[0] * mean, now.alpha[0] ** 2 * var + now.sigma[0] ** 2
    rows = []
    for i in range(grid.num_steps):
        gain = now.alpha[i] * var / (now.alpha[i] ** 2 * var + now.sigma[i] ** 2)
        slope = nodes.coef_x0[i] * gain + nodes.coef_xt[i]
        offset = nodes.coef_x0[i] * (1 - gain * now.alpha[i]) * mean
        current = slope * current[0] + offset, slope**2 * current[1] + std[i] ** 2
        rows.append(current)
    return np.transpose(rows)


def grids(process, num_steps):
    without_signal = process.alpha(np.array([process.time_range[1]]))[0] == 0
    names = ["uniform", "quadratic"] if without_signal else GRIDS
    return [to_clean(process, GRIDS[name](process, num_steps)) for name in names]


class TestOptimalVariance:
    @every_process
    @pytest.mark.parametrize("num_steps", [1, 2, 5, 50])
    @pytest.mark.parametrize("var", [VAR, 0.01, 1.0])
    def test_keeps_the_marginals_in_any_number_of_steps(self, process, num_steps, var):
        """They are the data's at every time, at last those of what the last x_t tells of x_0."""
        for grid in grids(process, num_steps):
            variance = optimal_variance(
                grid, exact_error(process, grid.now.time, var), visible=False
            )
            mean, variances = moments_on_the_way(grid, variance, MEAN, var)
            alpha, sigma = grid.after.alpha[:-1], grid.after.sigma[:-1]
            np.testing.assert_allclose(mean, np.append(alpha, 1) * MEAN, rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(variances[:-1], alpha**2 * var + sigma**2, rtol=HELD)
            alpha, sigma = grid.now.alpha[-1], grid.now.sigma[-1]
            told = (alpha * var) ** 2 / (alpha**2 * var + sigma**2)
            np.testing.assert_allclose(variances[-1], told, rtol=HELD, atol=1e-12)

    @every_process
    def test_is_the_posteriors_and_what_is_unknown(self, process):
        """β̃ + c_0²·v·σ²/(α²v + σ²), and no noise in the step to clean data."""
        for grid in grids(process, 10):
            actual = optimal_variance(grid, exact_error(process, grid.now.time), visible=False)
            now, step = grid.now, grid.posterior
            unknown = VAR * now.sigma**2 / (now.alpha**2 * VAR + now.sigma**2)
            expected = step.variance + step.coef_x0**2 * unknown
            np.testing.assert_allclose(actual[:-1], expected[:-1], rtol=HELD)
            assert actual[-1] == 0

    def test_reads_the_statistic_between_its_noise_levels(self):
        """There are 200 levels, even in λ: the error of the interpolation is of second order."""
        process = vp_cosine()
        times = process.time(np.linspace(15.0, ALL_NOISE, 200))
        for grid in grids(process, 20):
            near, exact = (
                optimal_variance(grid, exact_error(process, t), visible=False)
                for t in (times, grid.now.time)
            )
            np.testing.assert_allclose(near, exact, rtol=2e-3)

    def test_lies_between_that_of_known_data_and_that_of_the_range(self):
        """Data in [-1, 1] leaves unknown a variance of 0 to 1, whatever is measured."""
        process = PROCESSES["cosine"]
        for grid in grids(process, 10):
            log_snr, step = np.sort(grid.now.log_snr), grid.posterior
            drawn = grid.after.sigma > 0
            too_large, too_small = (
                optimal_variance(grid, X0Error(log_snr, np.full_like(log_snr, mse)), visible=False)
                for mse in (1e6, 0.0)
            )
            np.testing.assert_array_equal(too_small, np.where(drawn, step.variance, 0))
            largest = np.where(drawn, step.variance + step.coef_x0**2, 0)
            np.testing.assert_array_equal(too_large, largest)

    def test_leaves_no_visible_noise_in_the_last_noisy_level(self):
        """What the last but one step leaves: E|σ*·z| ≤ 2/255."""
        process = PROCESSES["cosine"]
        for grid in grids(process, 5):
            statistic = exact_error(process, grid.now.time)
            free = optimal_variance(grid, statistic, visible=False)
            capped = optimal_variance(grid, statistic)
            np.testing.assert_array_equal(np.delete(capped, -2), np.delete(free, -2))
            mean_size = np.sqrt(2 / np.pi * capped[-2])
            np.testing.assert_allclose(mean_size, min(2 / 255, np.sqrt(2 / np.pi * free[-2])))

    def test_is_capped_nowhere_on_a_way_that_ends_in_noise(self):
        process = PROCESSES["cosine"]
        grid = along(process, np.array([90.0, 50.0, 20.0, 5.0]))
        statistic = exact_error(process, grid.now.time)
        free = optimal_variance(grid, statistic, visible=False)
        np.testing.assert_array_equal(optimal_variance(grid, statistic), free)

    def test_is_finite_where_there_is_no_signal(self):
        process = PROCESSES["zero_terminal_snr"]
        grid = to_clean(process, GRIDS["uniform"](process, 10))
        assert grid.now.log_snr[0] == -np.inf
        statistic = exact_error(process, np.arange(100.0))
        assert np.all(np.isfinite(optimal_variance(grid, statistic)))
