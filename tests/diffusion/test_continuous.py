"""Every process against the papers' formulas at 50 digits, and what all processes share."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from mpmath import mp

from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.continuous import (
    ContinuousProcess,
    edm,
    rectified_flow,
    shifted,
    ve,
    vp_cosine,
    vp_linear,
    vp_sigmoid,
)
from jax_ddpm.diffusion.process import Process
from jax_ddpm.diffusion.schedules import make_betas

mp.dps = 50
pytestmark = pytest.mark.usefixtures("x64")
quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

METHODS = ("alpha", "sigma", "log_snr", "time")


class Case(NamedTuple):
    process: ContinuousProcess
    levels: Callable  # t → (α, σ) in mpmath


def linear_beta(beta_min, beta_max):
    """The marginal of Song et al. 2021, eq. 33."""
    low, high = map(mp.mpf, (beta_min, beta_max))

    def levels(t):
        alpha = mp.exp(-(t**2) * (high - low) / 4 - t * low / 2)
        return alpha, mp.sqrt(1 - alpha**2)

    return levels


def cosine(t):
    """Nichol & Dhariwal 2021, eq. 17, without its offset."""
    return mp.cos(mp.pi * t / 2), mp.sin(mp.pi * t / 2)


def sigmoid(start, end, tau):
    """ᾱ = (s(end/τ) - s(u/τ))/(s(end/τ) - s(start/τ)), u from start to end (Chen 2023, alg. 1)."""
    start, end, tau = map(mp.mpf, (start, end, tau))

    def logistic(u):
        return 1 / (1 + mp.exp(-u / tau))

    def levels(t):
        fall = logistic(end) - logistic(start + t * (end - start))
        alpha_bar = fall / (logistic(end) - logistic(start))
        return mp.sqrt(alpha_bar), mp.sqrt(1 - alpha_bar)

    return levels


def geometric(sigma_min, sigma_max):
    """Song et al. 2021, eq. 31, as their code has it."""
    low, high = map(mp.mpf, (sigma_min, sigma_max))
    return lambda t: (mp.mpf(1), low * (high / low) ** t)


def noise_level(t):
    """Karras et al. 2022: σ(t) = t."""
    return mp.mpf(1), t


def straight(t):
    """Liu et al. 2023: x_t = (1-t)·x_0 + t·ε."""
    return 1 - t, t


SIZE = {
    "variance_preserving": lambda alpha, sigma: mp.hypot(alpha, sigma),
    "variance_exploding": lambda alpha, sigma: alpha,
    "flow": lambda alpha, sigma: alpha + sigma,
}


def noisier(case, factor):
    """σ against α multiplied, in the units of the same scaling."""

    def levels(t):
        alpha, sigma = case.levels(t)
        size = SIZE[case.process.scaling](alpha, factor * sigma)
        return alpha / size, factor * sigma / size

    return Case(shifted(case.process, factor), levels)


CASES = {
    "vp_linear": Case(vp_linear(), linear_beta("0.1", 20)),
    "vp_linear(0.3, 9)": Case(vp_linear(0.3, 9.0), linear_beta("0.3", 9)),
    "vp_cosine": Case(vp_cosine(), cosine),
    "vp_sigmoid": Case(vp_sigmoid(), sigmoid(-3, 3, 1)),
    "vp_sigmoid(0, 3, 0.3)": Case(vp_sigmoid(0.0, 3.0, 0.3), sigmoid(0, 3, "0.3")),
    "ve": Case(ve(), geometric("0.01", 50)),
    "ve(0.02, 348)": Case(ve(0.02, 348.0), geometric("0.02", 348)),
    "edm": Case(edm(), noise_level),
    "rectified_flow": Case(rectified_flow(), straight),
}
CASES |= {
    f"shifted {name}": noisier(CASES[name], 4.0)
    for name in ("vp_linear", "vp_cosine", "vp_sigmoid", "ve", "edm", "rectified_flow")
}
CHAIN = Chain(make_betas("linear", 1000))
PROCESSES = {name: case.process for name, case in CASES.items()} | {"chain": CHAIN}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
every_continuous_process = pytest.mark.parametrize(
    "process", [case.process for case in CASES.values()], ids=CASES.keys()
)


def times(process):
    """The ends of the process and times between them, dense towards both."""
    low, high = process.time_range
    near = (high - low) * np.geomspace(1e-6, 0.499, 20)
    return np.unique(np.concatenate([[low], low + near, high - near, [high]]))


def exact(case, t):
    """α, σ and λ at 50 digits of the float that t is, rounded once to float64."""
    rows = []
    for alpha, sigma in (case.levels(mp.mpf(float(one_t))) for one_t in t):
        rows.append((alpha, sigma, 2 * mp.log(alpha / sigma) if alpha else -mp.inf))
    return np.array(rows, float).T


# How the code is used: tables in float64 on the host, float32 in compiled programs.
RUN = {np.float64: lambda function: function, np.float32: jax.jit}


def methods(process, t):
    return process.alpha(t), process.sigma(t), process.log_snr(t)


class TestFormulas:
    @every_case
    def test_in_float64(self, case):
        """Errors are relative in α and σ at either end, absolute in λ, which passes through 0."""
        t = times(case.process)
        alpha, sigma, log_snr = exact(case, t)
        np.testing.assert_allclose(case.process.alpha(t), alpha, rtol=1e-13)
        np.testing.assert_allclose(case.process.sigma(t), sigma, rtol=1e-13)
        np.testing.assert_allclose(case.process.log_snr(t), log_snr, atol=1e-13)

    @every_case
    def test_in_float32_under_jit(self, case):
        """λ up to 30 is rounded to 1e-6, and α and σ to half of it."""
        t = times(case.process).astype(np.float32)
        alpha, sigma, log_snr = exact(case, t)
        levels = jax.jit(lambda t: methods(case.process, t))(t)
        assert all(level.dtype == jnp.float32 for level in levels)
        np.testing.assert_allclose(levels[0], alpha, rtol=2e-6)
        np.testing.assert_allclose(levels[1], sigma, rtol=2e-6)
        np.testing.assert_allclose(levels[2], log_snr, atol=4e-6)

    def test_a_flow_ends_in_nothing_but_noise(self):
        process, end = rectified_flow(), np.array([1.0])
        alpha, sigma, log_snr = methods(process, end)
        assert (alpha, sigma, log_snr) == (0, 1, -np.inf)
        assert process.time(log_snr) == 1

    def test_vp_linear_is_the_limit_of_the_chain(self):
        """λ at step T·t - 1 of a chain of T steps, whose error halves as T doubles."""
        t = np.array([0.25, 0.5, 0.75, 1.0])
        errors = []
        for num_timesteps in (1000, 2000, 4000):
            chain = Chain(make_betas("linear", num_timesteps))
            log_snr = chain.log_snr(t * num_timesteps - 1)
            errors.append(log_snr - vp_linear().log_snr(t))
        assert np.max(np.abs(errors[-1])) < 0.02
        np.testing.assert_allclose(errors[0] / errors[1], 2, rtol=0.01)
        np.testing.assert_allclose(errors[1] / errors[2], 2, rtol=0.005)


class TestEveryProcess:
    @every_process
    def test_is_a_process(self, process):
        assert isinstance(process, Process)

    @every_process
    def test_log_snr_falls(self, process):
        assert np.all(np.diff(process.log_snr(times(process))) < 0)

    @every_process
    def test_log_snr_is_that_of_alpha_and_sigma(self, process):
        t = times(process)
        alpha, sigma, log_snr = methods(process, t)
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(2 * np.log(alpha / sigma), log_snr, rtol=1e-12, atol=1e-12)

    @every_process
    @pytest.mark.parametrize("dtype", RUN)
    def test_time_inverts_log_snr(self, process, dtype):
        """It holds to the round-off of λ, which is up to 30."""
        t = times(process).astype(dtype)
        back = RUN[dtype](lambda t: process.time(process.log_snr(t)))(t)
        tolerance = 16 * np.finfo(dtype).eps
        # λ at t = 0 is finite only where it is linear in t, so that errors of t are absolute.
        np.testing.assert_allclose(back, t, rtol=tolerance, atol=tolerance * (t[0] == 0))

    @every_process
    @pytest.mark.parametrize("dtype", RUN)
    def test_log_snr_inverts_time(self, process, dtype):
        """It holds to the round-off of λ and of t, where λ may be steep."""
        ends = process.log_snr(np.array(process.time_range))
        log_snr = np.linspace(ends[0], max(ends[1], -30), 101).astype(dtype)
        back = RUN[dtype](lambda log_snr: process.log_snr(process.time(log_snr)))(log_snr)
        t = jnp.asarray(process.time(log_snr.astype(float)))
        slope = jax.vmap(jax.grad(process.log_snr))(t)
        bound = 4 * np.finfo(dtype).eps * (np.abs(log_snr) + np.abs(t * slope) + 1)
        assert np.all(np.abs(back - log_snr) <= bound)

    @every_process
    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    @pytest.mark.parametrize("method", METHODS)
    def test_jax_agrees_with_numpy_and_keeps_the_dtype(self, process, dtype, method):
        """Both take the same float; NumPy's tables are float64."""
        argument = process.log_snr(times(process)) if method == "time" else times(process)
        argument = argument.astype(dtype)
        on_host = getattr(process, method)(argument.astype(np.float64))
        in_jax = getattr(process, method)(jnp.asarray(argument))
        assert isinstance(on_host, np.ndarray)
        assert isinstance(in_jax, jax.Array)
        assert on_host.dtype == np.float64
        assert in_jax.dtype == dtype
        tolerance = 64 * np.finfo(dtype).eps
        np.testing.assert_allclose(in_jax, on_host, rtol=tolerance, atol=tolerance)

    @every_process
    @pytest.mark.parametrize("method", METHODS)
    def test_one_time_is_an_element_of_many(self, process, method):
        t = times(process)
        argument = process.log_snr(t) if method == "time" else t
        call = getattr(process, method)
        one = call(jnp.asarray(argument[7]))
        assert one.shape == ()
        np.testing.assert_allclose(one, call(argument)[7], rtol=1e-13)

    @every_process
    def test_all_times_of_the_range_are_noisy_and_finite_in_float32(self, process):
        t = jnp.asarray(process.time_range, jnp.float32)
        alpha, sigma = process.alpha(t), process.sigma(t)
        assert np.all(np.isfinite(alpha) & np.isfinite(sigma) & (alpha >= 0) & (sigma > 0))

    @every_continuous_process
    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    def test_units_of_the_scaling(self, process, dtype):
        t = jnp.asarray(times(process), dtype)
        alpha, sigma = process.alpha(t), process.sigma(t)
        size = {
            "variance_preserving": jnp.hypot(alpha, sigma),
            "variance_exploding": alpha,
            "flow": alpha + sigma,
        }[process.scaling]
        # λ is rounded to |λ|·eps; to first order errors of α and σ cancel.
        np.testing.assert_allclose(size, 1, rtol=16 * np.finfo(dtype).eps)

    @every_continuous_process
    def test_made_twice_it_compiles_once(self, process):
        """Static parts of a pytree are compared and hashed."""
        again = copy.deepcopy(process)
        assert again == process
        assert hash(again) == hash(process)


class TestEnds:
    @pytest.mark.parametrize(
        ("name", "log_snr"),
        [
            ("vp_cosine", [15, -15]),
            ("vp_sigmoid", [15, -15]),
            ("vp_sigmoid(0, 3, 0.3)", [15, -15]),
            ("ve", [-2 * np.log(0.01), -2 * np.log(50)]),
            ("edm", [-2 * np.log(0.002), -2 * np.log(80)]),
            ("shifted edm", [-2 * np.log(0.008), -2 * np.log(320)]),
        ],
    )
    def test_log_snr(self, name, log_snr):
        process = PROCESSES[name]
        ends = process.log_snr(np.array(process.time_range))
        np.testing.assert_allclose(ends, log_snr, rtol=1e-10)

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("vp_linear", 1),
            ("vp_cosine", 1),
            ("shifted vp_cosine", 1),
            ("chain", 1),
            ("ve", 50),
            ("edm", 80),
            ("shifted edm", 320),
            ("rectified_flow", 1),
            ("shifted rectified_flow", 1),
        ],
    )
    def test_prior_is_the_noise_at_the_noisiest_time(self, name, expected):
        process = PROCESSES[name]
        np.testing.assert_allclose(process.prior_std(process.time_range[1]), expected, rtol=1e-13)

    @pytest.mark.parametrize("name", ["vp_linear", "vp_cosine", "vp_sigmoid", "chain"])
    def test_hardly_any_signal_is_left_under_the_prior(self, name):
        process = PROCESSES[name]
        assert process.alpha(np.array([process.time_range[1]])) < 0.01


class TestShifted:
    @every_continuous_process
    @pytest.mark.parametrize("factor", [0.25, 3.0])
    def test_multiplies_noise_to_signal_at_every_time(self, process, factor):
        t = times(process)
        t = t[process.alpha(t) > 0]
        moved = shifted(process, factor)
        ratio = moved.sigma(t) / moved.alpha(t)
        expected = factor * process.sigma(t) / process.alpha(t)
        np.testing.assert_allclose(ratio, expected, rtol=1e-13)
        assert moved.time_range == process.time_range

    @pytest.mark.parametrize("factor", [0.25, 3.0])
    def test_of_a_flow_is_another_time(self, factor):
        """t → f·t/(1 + (f-1)·t) (Esser et al. 2024, eq. 23)."""
        t = times(rectified_flow())
        moved = shifted(rectified_flow(), factor)
        np.testing.assert_allclose(moved.sigma(t), factor * t / (1 + (factor - 1) * t), rtol=1e-13)
        np.testing.assert_allclose(moved.alpha(t), (1 - t) / (1 + (factor - 1) * t), rtol=1e-13)

    @every_continuous_process
    def test_twice_is_once_by_the_product(self, process):
        t = times(process)
        twice = methods(shifted(shifted(process, 3.0), 0.5), t)
        for level, expected in zip(twice, methods(shifted(process, 1.5), t), strict=True):
            np.testing.assert_allclose(level, expected, rtol=1e-13, atol=1e-14)

    @pytest.mark.parametrize("name", ["vp_linear", "vp_cosine", "vp_sigmoid"])
    @pytest.mark.parametrize("scale", [0.3, 0.6])
    def test_is_the_input_scaling_of_chen(self, name, scale):
        """x_t = α·b·x_0 + σ·ε over its norm √(α²·b² + σ²) (Chen 2023, section 2.3)."""
        process = PROCESSES[name]
        t = times(process)
        alpha, sigma = process.alpha(t) * scale, process.sigma(t)
        moved = shifted(process, 1 / scale)
        norm = np.sqrt(alpha**2 + sigma**2)
        np.testing.assert_allclose(moved.alpha(t), alpha / norm, rtol=1e-13)
        np.testing.assert_allclose(moved.sigma(t), sigma / norm, rtol=1e-13)
