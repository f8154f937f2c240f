"""Grids: noise levels from the noisiest down, and the steps between them."""

import jax
import numpy as np
import pytest
from exact import GaussianDenoiser

from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.continuous import edm, rectified_flow, shifted, ve, vp_cosine, vp_linear
from jax_ddpm.diffusion.processes import make_process
from jax_ddpm.diffusion.samplers.grid import (
    GRIDS,
    along,
    karras,
    levels,
    log_snr_uniform,
    quadratic,
    to_clean,
    uniform,
)
from jax_ddpm.diffusion.samplers.scan import sample
from jax_ddpm.diffusion.samplers.table import SAMPLERS, usual_grid
from jax_ddpm.diffusion.schedules import make_betas, zero_terminal_snr

CHAIN = Chain(make_betas("linear", 100))
WITH_SIGNAL = {
    "chain": CHAIN,
    "vp_cosine": vp_cosine(),
    "vp_linear": vp_linear(),
    "ve": ve(),
    "edm": edm(),
}
WITHOUT_SIGNAL = {
    "rectified_flow": rectified_flow(),
    "zero_terminal": Chain(zero_terminal_snr(make_betas("linear", 100))),
}
PROCESSES = WITH_SIGNAL | WITHOUT_SIGNAL


@pytest.fixture(params=PROCESSES)
def process(request):
    return PROCESSES[request.param]


@pytest.fixture(params=WITH_SIGNAL)
def with_signal(request):
    return WITH_SIGNAL[request.param]


@pytest.fixture(params=WITHOUT_SIGNAL)
def without_signal(request):
    return WITHOUT_SIGNAL[request.param]


def useful_start(process):
    """The start of karras and log_snr: where x_T is N(0, I), no noisier than λ = -10.2."""
    high = process.time_range[1]
    if process.prior_std(0.5) == 1 and process.log_snr(np.array([high]))[0] < -10.2:
        return process.time(np.array([-10.2]))[0]
    return high


class TestTimes:
    @pytest.mark.parametrize("num_steps", [1, 2, 9, 100])
    @pytest.mark.parametrize("name", GRIDS)
    def test_fall_from_the_noisiest_to_the_least_noisy(self, with_signal, name, num_steps):
        """The uniform grid ends a step before in continuous time."""
        times = GRIDS[name](with_signal, num_steps)
        low, high = with_signal.time_range
        if name in ("karras", "log_snr"):
            high = useful_start(with_signal)
        assert times.dtype == np.float64
        assert len(times) == num_steps
        assert times[0] == high
        assert np.all(np.diff(times) < 0)
        if name == "uniform" and with_signal is not CHAIN:
            assert times[-1] - low == pytest.approx((high - low) / num_steps)
        elif num_steps > 1:
            assert times[-1] == low

    @pytest.mark.parametrize("rho", [1.0, 7.0])
    def test_of_karras_are_the_papers(self, with_signal, rho):
        """Karras et al. 2022, eq. 5, in their σ, which is σ/α."""
        process, n = with_signal, 20
        times = karras(process, n, rho)
        ends = np.array([useful_start(process), process.time_range[0]])
        sigma_max, sigma_min = process.sigma(ends) / process.alpha(ends)
        step = (sigma_min ** (1 / rho) - sigma_max ** (1 / rho)) / (n - 1)
        expected = (sigma_max ** (1 / rho) + np.arange(n) * step) ** rho
        actual = process.sigma(times) / process.alpha(times)
        np.testing.assert_allclose(actual, expected, rtol=1e-9)

    def test_of_karras_are_sigma_itself_in_edm(self):
        """18 steps are their CIFAR-10 sampler; the second level by hand."""
        times = karras(edm(), 18)
        second = (80 ** (1 / 7) + (0.002 ** (1 / 7) - 80 ** (1 / 7)) / 17) ** 7
        assert times[:2] == pytest.approx([80, second])

    def test_of_log_snr_are_even_in_it(self, with_signal):
        log_snr = with_signal.log_snr(log_snr_uniform(with_signal, 20))
        np.testing.assert_allclose(np.diff(log_snr), np.ptp(log_snr) / 19, rtol=1e-9)

    def test_quadratic_are_even_in_the_root(self, process):
        root = np.sqrt(quadratic(process, 20))
        np.testing.assert_allclose(np.diff(root), -np.ptp(root) / 19, rtol=1e-9)

    @pytest.mark.parametrize("num_steps", [2, 7, 33, 99, 100])
    def test_uniform_are_whole_steps_of_a_chain(self, num_steps):
        times = uniform(CHAIN, num_steps)
        np.testing.assert_array_equal(times, np.round(times))
        np.testing.assert_allclose(np.diff(times), -99 / (num_steps - 1), atol=1)
        to_clean(CHAIN, times)

    def test_more_than_the_chain_has_are_refused(self):
        with pytest.raises(ValueError, match="num_steps is 101; it must be at most"):
            to_clean(CHAIN, uniform(CHAIN, 101))

    @pytest.mark.parametrize("name", ["karras", "log_snr"])
    @pytest.mark.parametrize("process", ["chain", "vp_cosine", "edm"])
    def test_do_not_dwell_where_all_is_noise(self, process, name):
        """It holds where x_T is N(0, I) at any of these times; in edm it is not."""
        process = WITH_SIGNAL[process]
        start = process.log_snr(GRIDS[name](process, 10))[0]
        assert start == pytest.approx(-10.2 if process.prior_std(0.5) == 1 else -2 * np.log(80))

    @pytest.mark.parametrize("name", ["karras", "log_snr"])
    def test_at_infinite_noise_are_refused(self, without_signal, name):
        with pytest.raises(ValueError, match="ends without signal"):
            GRIDS[name](without_signal, 10)

    @pytest.mark.parametrize("name", ["uniform", "quadratic"])
    def test_uniform_and_quadratic_start_without_signal(self, without_signal, name):
        assert levels(without_signal, GRIDS[name](without_signal, 10)).alpha[0] == 0


class TestToClean:
    def test_goes_through_the_times_and_ends_without_noise(self, process):
        times = uniform(process, 10)
        grid = to_clean(process, times)
        assert grid.num_steps == 10
        np.testing.assert_array_equal(grid.now.time, times)
        for now, after, end in zip(grid.now[1:], grid.after[1:], (1, 0, np.inf), strict=True):
            np.testing.assert_array_equal(after, np.append(now[1:], end))

    def test_of_one_time_is_one_step(self, process):
        grid = to_clean(process, uniform(process, 1))
        assert grid.num_steps == 1
        assert grid.step_size == [np.inf]

    @pytest.mark.parametrize("times", [[10.0, 20.0], [30.0, 10.0, 10.0], [30.0, 10.0, 20.0]])
    def test_refuses_times_that_do_not_fall(self, times):
        with pytest.raises(ValueError, match="must decrease"):
            to_clean(CHAIN, np.array(times))


class TestBetweenSignalAndNone:
    """The last step of a chain of zero terminal SNR: λ falls to -∞ within it."""

    CHAIN = make_process("linear", num_timesteps=50, zero_terminal_snr=True)

    @pytest.mark.parametrize("grid", [to_clean, along])
    def test_no_time_lies(self, grid):
        with pytest.raises(ValueError, match="lies between 48 and 49, which is pure noise"):
            grid(self.CHAIN, np.array([49.0, 48.5, 20.0]))

    def test_whole_times_do(self):
        grid = to_clean(self.CHAIN, np.array([49.0, 48.0, 20.5]))
        assert grid.num_steps == 3

    def test_quadratic_of_more_steps_than_the_chain_has_is_refused(self):
        with pytest.raises(ValueError, match="take fewer steps"):
            to_clean(self.CHAIN, quadratic(self.CHAIN, 150))


class TestUsualGrid:
    @pytest.mark.parametrize("name", ["ancestral", "ddim", "euler", "predictor_corrector"])
    @pytest.mark.parametrize("factor", [1.0, 2.0])
    def test_of_noise_levels_is_karras_also_where_they_are_shifted(self, name, factor):
        assert usual_grid(name, shifted(edm(), factor)) == "karras"

    def test_keeps_the_width_of_the_data_where_they_are_shifted(self):
        process = shifted(edm(), 2.0)
        times = GRIDS[usual_grid("ddim", process)](process, 18)
        sampler = SAMPLERS["ddim"].make(to_clean(process, times))
        keys = jax.random.split(jax.random.key(0), 2000)
        denoiser = GaussianDenoiser(0.0, 0.75**2, process)
        x = sample(sampler, denoiser, sampler.start(keys, (2,)), keys, {})[0]
        assert 0.6 < x.std() < 0.8


class TestAlong:
    @pytest.mark.parametrize("direction", [1, -1])
    def test_goes_through_the_times_either_way(self, process, direction):
        times = uniform(process, 10)[::direction]
        grid = along(process, times)
        assert grid.num_steps == 9
        for now, after, expected in zip(grid.now, grid.after, levels(process, times), strict=True):
            np.testing.assert_array_equal(now, expected[:-1])
            np.testing.assert_array_equal(after, expected[1:])

    @pytest.mark.parametrize("times", [[], [5.0], [5.0, 5.0], [1.0, 3.0, 2.0], [3.0, 1.0, 1.0]])
    def test_refuses_times_that_neither_fall_nor_rise(self, times):
        with pytest.raises(ValueError, match="all falling or all rising"):
            along(CHAIN, np.array(times))


class TestSteps:
    def test_size_is_the_change_of_log_alpha_over_sigma(self, process):
        times = uniform(process, 10)[1:]
        signal_to_noise = process.alpha(times) / process.sigma(times)
        expected = np.append(np.diff(np.log(signal_to_noise)), np.inf)
        np.testing.assert_allclose(to_clean(process, times).step_size, expected, rtol=1e-9)

    def test_size_is_infinite_from_noise_alone(self, without_signal):
        grid = to_clean(without_signal, uniform(without_signal, 10))
        np.testing.assert_array_equal(np.isinf(grid.step_size), [True, *8 * [False], True])
        assert grid.now.log_snr[0] == -np.inf
        assert grid.now.noise_to_signal[0] == np.inf

    def test_add_up_to_the_noise_levels(self, process):
        """q(x_t | x_s) takes q(x_s | x_0) to q(x_t | x_0)."""
        grid = to_clean(process, uniform(process, 10))
        kept = grid.now.alpha / grid.after.alpha
        noise = kept**2 * grid.after.sigma**2 + grid.beta
        np.testing.assert_allclose(noise, grid.now.sigma**2, rtol=1e-12)

    def test_posterior_is_bayes_rule(self, process):
        """q(x_s | x_t, x_0) ∝ q(x_t | x_s)·q(x_s | x_0), normalised by summing over x_s."""
        grid = to_clean(process, uniform(process, 5))
        for i in range(grid.num_steps - 1):
            alpha_t, sigma_t = grid.now.alpha[i], grid.now.sigma[i]
            alpha_s, sigma_s = grid.after.alpha[i], grid.after.sigma[i]
            variance = sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2
            x0, eps_s, eps = 0.7, 0.4, -1.1
            xs = alpha_s * x0 + sigma_s * np.linspace(-12, 12, 100_001)
            xt = alpha_t / alpha_s * (alpha_s * x0 + sigma_s * eps_s) + np.sqrt(variance) * eps
            log_density = -((xt - alpha_t / alpha_s * xs) ** 2) / (2 * variance)
            log_density -= (xs - alpha_s * x0) ** 2 / (2 * sigma_s**2)
            weight = np.exp(log_density - np.max(log_density))
            weight /= np.sum(weight)
            mean = np.sum(weight * xs)
            coef_x0, coef_xt, posterior_variance = (column[i] for column in grid.posterior)
            assert coef_x0 * x0 + coef_xt * xt == pytest.approx(mean, rel=1e-8)
            assert posterior_variance == pytest.approx(np.sum(weight * (xs - mean) ** 2), rel=1e-8)

    def test_posterior_to_clean_data_is_x0(self, process):
        last = [column[-1] for column in to_clean(process, uniform(process, 5)).posterior]
        np.testing.assert_allclose(last, [1, 0, 0], atol=1e-15)
