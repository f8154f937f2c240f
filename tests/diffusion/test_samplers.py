"""Every sampler against every property, in every kind of process.

With the exact denoiser of Gaussian data a sampler is affine in x and in its noise. ``PATHS`` has
each a second time, as its paper has it and in that paper's coordinates, and from it the moments.
The probability-flow ODE is known in closed form whatever the data, as long as dimensions are
independent: what moves along it keeps its rank, F_s(x_s) = F_t(x_t), where F_t is the distribution
function of x_t.
"""

import dataclasses
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from exact import GaussianDenoiser, MixtureDenoiser
from scipy.optimize import brentq
from scipy.special import ndtr

from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.continuous import edm, rectified_flow, vp_cosine
from jax_ddpm.diffusion.denoiser import X0_ESTIMATE, InProcess
from jax_ddpm.diffusion.parameterisation import Prediction
from jax_ddpm.diffusion.process import fold_in, per_example_normal
from jax_ddpm.diffusion.samplers.ancestral import ancestral
from jax_ddpm.diffusion.samplers.ddim import ddim
from jax_ddpm.diffusion.samplers.dpmpp import dpmpp_2m
from jax_ddpm.diffusion.samplers.grid import along, to_clean, uniform
from jax_ddpm.diffusion.samplers.heun import heun
from jax_ddpm.diffusion.samplers.predictor_corrector import predictor_corrector
from jax_ddpm.diffusion.samplers.scan import sample
from jax_ddpm.diffusion.samplers.unipc import unipc
from jax_ddpm.diffusion.schedules import make_betas, zero_terminal_snr

pytestmark = pytest.mark.usefixtures("x64")
quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

WITH_SIGNAL = {
    "chain": Chain(make_betas("linear", 100)),
    "vp_cosine": vp_cosine(),
    "edm": edm(),
    "rectified_flow": rectified_flow(),
}
WITHOUT_SIGNAL = {
    "rectified_flow": rectified_flow(),
    "zero_terminal": Chain(zero_terminal_snr(make_betas("linear", 100))),
}
PROCESSES = WITH_SIGNAL | WITHOUT_SIGNAL

DETERMINISTIC = {
    "ddim": ddim,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "unipc_1": partial(unipc, order=1),
    "unipc_2": partial(unipc, order=2),
    "unipc_3": partial(unipc, order=3),
}
CHURN = {"churn": 1.5, "churn_range": (0.1, 10.0), "churn_noise": 1.1}
LINEAR = DETERMINISTIC | {
    "fixedsmall": partial(ancestral, variance="fixedsmall"),
    "fixedlarge": partial(ancestral, variance="fixedlarge"),
    "ddim_half": partial(ddim, eta=0.5),
    "ddim_1": partial(ddim, eta=1.0),
    "churn": partial(heun, **CHURN),
    "dpmpp_2m_half": partial(dpmpp_2m, eta=0.5),
    "dpmpp_2m_sde": partial(dpmpp_2m, eta=1.0),
}
SAMPLERS = LINEAR | {"predictor_corrector": predictor_corrector}
ORDER = {"ddim": 1, "heun": 2, "dpmpp_2m": 2, "unipc_1": 2, "unipc_2": 3, "unipc_3": 4}


class Data(NamedTuple):
    """Every dimension is drawn from Σ_k weights_k·N(means_k, var)."""

    weights: np.ndarray
    means: np.ndarray
    var: float

    def cdf(self, x, alpha, sigma):
        """The distribution function of α·x_0 + σ·ε."""
        std = np.sqrt(alpha**2 * self.var + sigma**2)
        return self.weights @ ndtr((x - alpha * self.means) / std)

    def quantiles(self, ranks, alpha, sigma):
        far = 5 * alpha + 10 * sigma

        def quantile(rank):
            return brentq(lambda x: self.cdf(x, alpha, sigma) - rank, -far, far, xtol=1e-15)

        return np.vectorize(quantile)(ranks)


MEAN, VAR = 0.3, 0.25
GAUSSIAN = Data(np.full(2, 0.5), np.full(2, MEAN), VAR)
MIXTURE = Data(np.array([0.3, 0.7]), np.array([-0.6, 0.5]), 0.05)
DATA = {"gaussian": GAUSSIAN, "mixture": MIXTURE}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
    """A process at the times of a sampler's nodes: as data, so that one program serves them all."""

    times: jax.Array
    alphas: jax.Array
    sigmas: jax.Array

    def alpha(self, t):
        return self.alphas[jnp.argmin(jnp.abs(self.times - t))]

    def sigma(self, t):
        return self.sigmas[jnp.argmin(jnp.abs(self.times - t))]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TableDenoiser:
    """The exact denoiser of the data in a process known by its table."""

    data: Data
    table: Table

    def __call__(self, xt, t, conditioning):
        data = jax.tree.map(partial(jnp.asarray, dtype=xt.dtype), self.data)
        return MixtureDenoiser(*data, self.table)(xt, t, conditioning)


TRACED = []


@cache
def program(name):
    """The sampler, compiled once for all nodes of one number."""
    sampler = SAMPLERS[name](to_clean(edm(), np.array([3.0, 2.0, 1.0])))

    @jax.jit
    def run(nodes, denoiser, x, keys):
        TRACED.append(name)
        return sample(sampler._replace(nodes=nodes), denoiser, x, keys, {})[0]

    return run


def keys_of(x):
    return jax.random.split(jax.random.key(0), len(x))


def run(name, grid, x, keys=None, data=GAUSSIAN, denoiser=None):
    """Samples from x, as a NumPy array."""
    nodes = SAMPLERS[name](grid).nodes
    levels = grid.process.alpha(nodes.time), grid.process.sigma(nodes.time)
    denoiser = denoiser or TableDenoiser(data, Table(nodes.time, *levels))
    keys = keys_of(x) if keys is None else keys
    return np.asarray(program(name)(nodes, denoiser, jnp.asarray(x), keys))


# log(α²/σ²) at the steps of most of the tests; no two steps are equally long.
LOG_SNRS = np.array([-6.0, -4.6, -2.0, -0.5, 1.5, 4.0, 4.9])


def grid_of(process, ends="clean"):
    """Six steps: to clean data, or to the last of the noise levels."""
    process = PROCESSES[process]
    times = process.time(LOG_SNRS)
    return to_clean(process, times[:-1]) if ends == "clean" else along(process, times)


def evenly(process, start, end, num_steps):
    """A grid of evenly spaced λ."""
    process = WITH_SIGNAL[process]
    return along(process, process.time(np.linspace(start, end, num_steps + 1)))


@pytest.fixture
def x(rng):
    return rng.standard_normal((4, 3))


def every(names, argument="name"):
    return pytest.mark.parametrize(argument, names)


every_process = every(WITH_SIGNAL, "process")


# The published steps: from α and σ at the n + 1 ends of steps, x and noise z[row] to the end.


def x0_given(x, alpha, sigma):
    """E[x_0 | x_t]."""
    return MEAN + alpha * VAR / (alpha**2 * VAR + sigma**2) * (x - alpha * MEAN)


def ancestral_path(alpha, sigma, x, z, large=False):
    """Ho et al. 2020, eqs. 6-7; ``large`` is the variance of q(x_t | x_s) in place of β̃."""
    scale = np.hypot(alpha, sigma)
    alpha_bar = (alpha / scale) ** 2
    for i in range(len(alpha) - 1):
        now, after = alpha_bar[i], alpha_bar[i + 1]
        beta = 1 - now / after
        mean = np.sqrt(after) * beta / (1 - now) * x0_given(x, alpha[i], sigma[i])
        mean += np.sqrt(1 - beta) * (1 - after) / (1 - now) * x / scale[i]
        variance = scale[i + 1] ** 2 * beta * (1 - after) / (1 - now)
        if large and after < 1:
            variance = sigma[i] ** 2 - (alpha[i] / alpha[i + 1]) ** 2 * sigma[i + 1] ** 2
        x = scale[i + 1] * mean + np.sqrt(variance) * z[i]
    return x


def ddim_path(alpha, sigma, x, z, eta):
    """Song et al. 2021 (DDIM), eqs. 12 and 16."""
    scale = np.hypot(alpha, sigma)
    alpha_bar = (alpha / scale) ** 2
    for i in range(len(alpha) - 1):
        now, after = alpha_bar[i], alpha_bar[i + 1]
        x0 = x0_given(x, alpha[i], sigma[i])
        eps = (x / scale[i] - np.sqrt(now) * x0) / np.sqrt(1 - now)
        std = eta * np.sqrt((1 - after) / (1 - now)) * np.sqrt(1 - now / after)
        direction = np.sqrt(np.maximum(1 - after - std**2, 0)) * eps
        x = scale[i + 1] * (np.sqrt(after) * x0 + direction + std * z[i])
    return x


def heun_path(alpha, sigma, x, z, churn=0.0, churn_range=(0.0, np.inf), churn_noise=1.0):
    """Karras et al. 2022, algorithm 2, whose x is x/α and whose t is σ/α."""
    t, x = sigma / alpha, x / alpha[0]
    for i in range(len(t) - 1):
        gamma = 0.0
        if churn_range[0] <= t[i] <= churn_range[1]:
            gamma = min(churn / (len(t) - 1), np.sqrt(2) - 1)
        raised = min(t[i] + gamma * t[i], t[0])
        x = x + np.sqrt(raised**2 - t[i] ** 2) * churn_noise * z[2 * i]
        slope = (x - x0_given(x, 1, raised)) / raised
        after = x + (t[i + 1] - raised) * slope
        if t[i + 1] > 0:
            slope_after = (after - x0_given(after, 1, t[i + 1])) / t[i + 1]
            after = x + (t[i + 1] - raised) * (slope + slope_after) / 2
        x = after
    return alpha[-1] * x


def dpmpp_path(alpha, sigma, x, z, eta):
    """Lu et al. 2022 (DPM-Solver++), algorithm 2 for η = 0, SDE-DPM-Solver++(2M) for η = 1."""
    last_x0 = last_h = None
    for i in range(len(alpha) - 1):
        x0 = direction = x0_given(x, alpha[i], sigma[i])
        if sigma[i + 1] == 0:
            return x0
        h = np.log(alpha[i + 1] / sigma[i + 1]) - np.log(alpha[i] / sigma[i])
        if last_h:
            r = last_h / h
            direction = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * last_x0
        x = sigma[i + 1] / sigma[i] * np.exp(-eta * h) * x
        x = x + alpha[i + 1] * (1 - np.exp(-(1 + eta) * h)) * direction
        x = x + sigma[i + 1] * np.sqrt(1 - np.exp(-2 * eta * h)) * z[i]
        last_x0, last_h = x0, h
    return x


def unipc_path(alpha, sigma, x, z, order):
    """Zhao et al. 2023, as what it is: the integral of exp(λ)·(a polynomial through x̂_0's).

    x_s = σ_s/σ_t·x_t + σ_s·∫exp(λ)·x̂_0 dλ with λ = log(α/σ) (Lu et al. 2022, proposition 4.1).
    """
    with np.errstate(divide="ignore"):
        at = np.log(alpha / sigma)
    x0s = []

    def step(x, i, points):
        h = at[i + 1] - at[i]
        if len(points) <= 2:  # the paper's ½ in place of the second-order weight
            integral = x0s[i]
            if len(points) == 2:
                integral = integral + (x0s[points[1]] - x0s[i]) / (at[points[1]] - at[i]) * h / 2
            integral = (1 - np.exp(-h)) * integral
        else:
            roots, weights = np.polynomial.legendre.leggauss(20)
            inside = at[i] + h * (roots + 1) / 2
            integral = 0.0
            for k in points:
                others = np.array([j for j in points if j != k])[:, None]
                basis = np.prod((inside - at[others]) / (at[k] - at[others]), axis=0)
                weight = np.sum(weights * np.exp(inside - at[i + 1]) * basis) * h / 2
                integral = integral + weight * x0s[k]
        return sigma[i + 1] / sigma[i] * x + alpha[i + 1] * integral

    last, last_points = None, []
    for i in range(len(alpha) - 1):
        x0s.append(x0_given(x, alpha[i], sigma[i]))
        if sigma[i + 1] == 0:
            return x0s[i]
        if i > 0:
            x = step(last, i - 1, [*last_points, i])
        last, last_points = x, [i - k for k in range(min(order, i + 1))]
        x = step(x, i, last_points)
    return x


PATHS = {
    "ddim": partial(ddim_path, eta=0.0),
    "heun": heun_path,
    "dpmpp_2m": partial(dpmpp_path, eta=0.0),
    "unipc_1": partial(unipc_path, order=1),
    "unipc_2": partial(unipc_path, order=2),
    "unipc_3": partial(unipc_path, order=3),
    "fixedsmall": ancestral_path,
    "fixedlarge": partial(ancestral_path, large=True),
    "ddim_half": partial(ddim_path, eta=0.5),
    "ddim_1": partial(ddim_path, eta=1.0),
    "churn": partial(heun_path, **CHURN),
    "dpmpp_2m_half": partial(dpmpp_path, eta=0.5),
    "dpmpp_2m_sde": partial(dpmpp_path, eta=1.0),
}


def ends_of_steps(process, log_snrs, ends):
    """α and σ of the steps through these λ, and of clean data after them."""
    process = WITH_SIGNAL[process]
    times = process.time(log_snrs)
    alpha, sigma = process.alpha(times), process.sigma(times)
    return (np.append(alpha, 1.0), np.append(sigma, 0.0)) if ends == "clean" else (alpha, sigma)


def draws(x, keys, num_rows=12):
    """The noise of every row of nodes."""
    return np.stack([per_example_normal(fold_in(keys, i), x) for i in range(num_rows)])


def moments(path, alpha, sigma):
    """Mean and variance of the samples of a path, from where x_t has the data's own."""
    rows = 2 * len(alpha)
    unit = np.hstack([np.zeros((rows + 1, 1)), np.eye(rows + 1)])
    offset, slope, *noise = path(alpha, sigma, unit[0], unit[1:])
    slope, noise = slope - offset, np.array(noise) - offset
    start = alpha[0] * MEAN, alpha[0] ** 2 * VAR + sigma[0] ** 2
    return offset + slope * start[0], slope**2 * start[1] + np.sum(noise**2)


class TestSteps:
    @every_process
    @pytest.mark.parametrize("ends", ["clean", "noisy"])
    @every(LINEAR)
    def test_are_the_papers(self, name, ends, process, x):
        log_snrs = LOG_SNRS[:-1] if ends == "clean" else LOG_SNRS
        levels = ends_of_steps(process, log_snrs, ends)
        expected = PATHS[name](*levels, x, draws(jnp.asarray(x), keys_of(x)))
        actual = run(name, grid_of(process, ends), x)
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)

    @every(LINEAR)
    def test_in_float32_are_those_in_float64(self, name, x):
        process = WITH_SIGNAL["vp_cosine"]
        levels = ends_of_steps("vp_cosine", LOG_SNRS[:-1], "clean")
        with jax.enable_x64(False):
            x, keys = jnp.asarray(x, jnp.float32), keys_of(x)
            denoiser = GaussianDenoiser(MEAN, VAR, process)
            actual = run(name, grid_of("vp_cosine"), x, keys, denoiser=denoiser)
            z = draws(x, keys)
        expected = PATHS[name](*levels, np.asarray(x, float), z.astype(float))
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, atol=2e-6)

    @every(LINEAR)
    @every_process
    def test_many_lead_to_the_datas_moments(self, name, process):
        """Only the variance that the last x_t does not tell is lost: a factor 1 + exp(-λ)/var."""
        path = partial(heun_path, churn=CHURN["churn"]) if name == "churn" else PATHS[name]
        end = 6.5 if process == "chain" else 9.0

        def error(num_steps):
            log_snrs = np.linspace(-8, end, num_steps)
            mean, var = moments(path, *ends_of_steps(process, log_snrs, "clean"))
            assert mean == pytest.approx(MEAN, abs=1e-3)
            return abs(var / VAR * (1 + np.exp(-end) / VAR) - 1)

        assert error(400) < 0.025
        assert error(400) < error(25) / 8


class TestOrder:
    """Errors against the exact flow between two noise levels, over evenly spaced λ."""

    @pytest.fixture
    def ranks(self, rng):
        return rng.uniform(0.05, 0.95, (4, 3))

    @staticmethod
    def rate(error):
        return np.log2(error(48) / error(96))

    @every_process
    @every(DATA, "data")
    @every(ORDER)
    def test_is_the_papers(self, name, data, process, ranks):
        data = DATA[data]

        def error(num_steps):
            grid = evenly(process, -5, 2, num_steps)
            start = data.quantiles(ranks, grid.now.alpha[0], grid.now.sigma[0])
            exact = data.quantiles(ranks, grid.after.alpha[-1], grid.after.sigma[-1])
            return np.max(np.abs(run(name, grid, start, data=data) - exact))

        assert self.rate(error) == pytest.approx(ORDER[name], abs=0.3)

    @every_process
    @every(ORDER)
    def test_holds_for_the_way_to_noise_and_back(self, name, process, ranks):
        """Orders up to 3: the first step's corrector of order 2 is felt where x_0 still moves."""

        def error(num_steps):
            up = evenly(process, 2, -5, num_steps)
            down = evenly(process, -5, 2, num_steps)
            x = MIXTURE.quantiles(ranks, up.now.alpha[0], up.now.sigma[0])
            noise = run(name, up, x, data=MIXTURE)
            return np.max(np.abs(run(name, down, noise, data=MIXTURE) - x))

        assert error(96) < 0.03
        assert self.rate(error) > min(ORDER[name], 3) - 0.3


class TestManySteps:
    """Steps so short that a difference of neighbouring φ-functions has no digit left."""

    @pytest.mark.parametrize("order", [1, 2, 3, 4])
    def test_of_unipc_lead_to_the_flows_end(self, order):
        chain = Chain(make_betas("linear", 4000))
        sampler = unipc(to_clean(chain, uniform(chain, 4000)), order)
        x = jnp.linspace(-2, 2, 9)[:, None]
        keys, denoiser = jax.random.split(jax.random.key(0), 9), GaussianDenoiser(0.0, 0.25, chain)
        alpha, sigma = chain.alpha(np.array([0.0, 3999])), chain.sigma(np.array([0.0, 3999]))
        std = np.sqrt(alpha**2 / 4 + sigma**2)
        at_the_least_noise = x * std[0] / std[1]
        end = denoiser(at_the_least_noise, jnp.zeros(()), {}).x0
        np.testing.assert_allclose(sample(sampler, denoiser, x, keys, {})[0], end, atol=5e-5)


class TestFirstOrder:
    @every_process
    @every([name for name in DETERMINISTIC if name != "heun"])
    def test_one_step_is_ddims(self, name, process, x):
        grid = evenly(process, -3, 1, 1)
        np.testing.assert_allclose(run(name, grid, x), run("ddim", grid, x), rtol=1e-12)

    @every_process
    @every(DETERMINISTIC)
    def test_one_step_to_clean_data_is_its_estimate(self, name, process, x):
        grid = to_clean(PROCESSES[process], PROCESSES[process].time(np.array([-3.0])))
        estimate = x0_given(x, grid.now.alpha[0], grid.now.sigma[0])
        np.testing.assert_allclose(run(name, grid, x), estimate, rtol=1e-12)

    @every_process
    @pytest.mark.parametrize("ends", ["clean", "noisy"])
    @pytest.mark.parametrize(
        ("name", "first"),
        [*((name, "ddim") for name in DETERMINISTIC), ("dpmpp_2m_sde", "fixedsmall")],
    )
    def test_is_all_there_is_where_x0_stands_still(self, name, first, ends, process, x):
        grid, point = grid_of(process, ends), GAUSSIAN._replace(var=0.0)
        expected = run(first, grid, x, data=point)
        np.testing.assert_allclose(run(name, grid, x, data=point), expected, rtol=1e-11)

    @every_process
    @pytest.mark.parametrize("ends", ["clean", "noisy"])
    def test_ddim_at_1_is_ancestral(self, ends, process, x):
        grid = grid_of(process, ends)
        np.testing.assert_allclose(run("ddim_1", grid, x), run("fixedsmall", grid, x), rtol=1e-11)

    @every_process
    @every(["ddim_1", "dpmpp_2m_sde"])
    def test_one_step_with_noise_is_ancestral(self, name, process, x):
        grid = evenly(process, -3, 1, 1)
        np.testing.assert_allclose(run(name, grid, x), run("fixedsmall", grid, x), rtol=1e-12)


class TestProcesses:
    @pytest.mark.parametrize("process", ["chain", "vp_cosine", "rectified_flow"])
    @every([name for name in SAMPLERS if name not in ("fixedlarge", "predictor_corrector")])
    def test_differ_in_units_alone(self, name, process, x):
        """The same λ, the same noise, the same x/α. β and 1-β depend on the units of both ends."""

        def ratio(process):
            grid = grid_of(process, "noisy")
            return run(name, grid, grid.now.alpha[0] * 10 * x) / grid.after.alpha[-1]

        np.testing.assert_allclose(ratio(process), ratio("edm"), rtol=1e-10)

    @every(["unipc_2", "ddim_1"])
    def test_a_model_of_one_draws_the_same_images_in_another(self, name, x):
        chain, other = WITH_SIGNAL["chain"], WITH_SIGNAL["edm"]
        grid = to_clean(chain, uniform(chain, 6))
        grid_of_other = to_clean(other, other.time(grid.now.log_snr))
        denoiser = InProcess(GaussianDenoiser(MEAN, VAR, chain), chain, other)
        actual = run(name, grid_of_other, x / grid.now.alpha[0], denoiser=denoiser)
        np.testing.assert_allclose(actual, run(name, grid, x), rtol=1e-9)


class TestEvaluations:
    @every_process
    @every(SAMPLERS)
    def test_are_one_a_step_or_as_published(self, name, process):
        number = {"heun": 11, "churn": 11, "predictor_corrector": 12}.get(name, 6)
        assert SAMPLERS[name](grid_of(process)).num_evaluations == number

    @pytest.mark.parametrize("process", PROCESSES)
    @every(SAMPLERS)
    def test_never_see_clean_data(self, name, process):
        """Nodes see only the grid's times, except where noise was added."""
        grid = to_clean(PROCESSES[process], uniform(PROCESSES[process], 6))
        times = SAMPLERS[name](grid).nodes.time
        assert np.all(PROCESSES[process].sigma(times) > 0)
        assert name == "churn" or set(times) == set(grid.now.time)


class TestWithoutSignal:
    """x_T is noise alone: α = 0."""

    @pytest.mark.parametrize("process", WITHOUT_SIGNAL)
    @every(SAMPLERS)
    def test_samples_are_finite(self, name, process, x):
        grid = to_clean(WITHOUT_SIGNAL[process], uniform(WITHOUT_SIGNAL[process], 6))
        assert grid.now.alpha[0] == 0
        samples = run(name, grid, x)
        assert np.all(np.abs(samples - MEAN) < 5 * np.sqrt(VAR))

    @pytest.mark.parametrize("process", WITHOUT_SIGNAL)
    @every(DETERMINISTIC)
    def test_the_first_step_is_ddims(self, name, process, x):
        """x̂_0 is the data's mean, ε̂ is x."""
        process = WITHOUT_SIGNAL[process]
        grid = along(process, uniform(process, 6)[:2])
        expected = grid.after.alpha * MEAN + grid.after.sigma * x
        np.testing.assert_allclose(run(name, grid, x), expected, rtol=1e-12)

    @pytest.mark.parametrize("process", WITHOUT_SIGNAL)
    @every([name for name in DETERMINISTIC if name != "heun"])
    def test_so_is_the_second(self, name, process, x):
        """How x̂_0 changed since α = 0 says nothing of its slope in λ, and nothing is corrected."""
        grid = along(WITHOUT_SIGNAL[process], uniform(WITHOUT_SIGNAL[process], 6)[:3])
        np.testing.assert_allclose(run(name, grid, x), run("ddim", grid, x), rtol=1e-12)

    @pytest.mark.parametrize("process", WITHOUT_SIGNAL)
    @every(DETERMINISTIC)
    def test_data_are_led_to_it(self, name, process, x):
        """The exact flow whitens them: x_T = (x - α·mean)/√(α²·var + σ²)."""
        process = WITHOUT_SIGNAL[process]
        times = np.linspace(process.time(np.array([4.0]))[0], process.time_range[1], 49)
        grid = along(process, times)
        x = grid.now.alpha[0] * MEAN + np.sqrt(VAR) * x
        std = np.sqrt(grid.now.alpha[0] ** 2 * VAR + grid.now.sigma[0] ** 2)
        exact = (x - grid.now.alpha[0] * MEAN) / std
        np.testing.assert_allclose(run(name, grid, x), exact, atol=0.06)


class TestExamples:
    """Each depends on its own x and key alone."""

    @pytest.fixture
    def grid(self):
        return grid_of("vp_cosine")

    @every(SAMPLERS)
    def test_in_another_order_are_the_same(self, name, grid, x):
        keys = keys_of(x)
        back = run(name, grid, x[::-1], keys[::-1])
        np.testing.assert_allclose(back[::-1], run(name, grid, x, keys), rtol=1e-12)

    @every(SAMPLERS)
    def test_do_not_touch_each_other(self, name, grid, x):
        changed = x + (np.arange(4) == 2)[:, None]
        before, after = run(name, grid, x), run(name, grid, changed)
        np.testing.assert_array_equal(np.any(before != after, axis=1), np.arange(4) == 2)

    @every(SAMPLERS)
    def test_draw_from_their_own_key(self, name, grid, x):
        """It holds where anything is drawn."""
        keys = keys_of(x)
        changed = keys.at[2].set(jax.random.key(7))
        before, after = run(name, grid, x, keys), run(name, grid, x, changed)
        differs = (np.arange(4) == 2) & (name not in DETERMINISTIC)
        np.testing.assert_array_equal(np.any(before != after, axis=1), differs)


class TestDistribution:
    @every(["heun", "unipc_2", "ddim_1", "dpmpp_2m_sde"])
    def test_has_the_datas_share_of_each_component(self, name, rng):
        """So is everything between, after Kolmogorov: less than 1 in 10,000 is this far off."""
        count, process = 10_000, WITH_SIGNAL["vp_cosine"]
        grid = to_clean(process, process.time(np.linspace(-9.0, 7.0, 65)))
        x = rng.standard_normal((count, 1))
        samples = np.sort(run(name, grid, x, data=MIXTURE), axis=0)
        share = np.mean(samples > 0)
        expected = 1 - MIXTURE.cdf(0.0, 1.0, 0.0)
        assert share == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / count))
        exact = np.array([MIXTURE.cdf(x, 1.0, 0.0) for x in samples[:, 0]])
        assert np.max(np.abs(exact - (np.arange(count) + 0.5) / count)) < 2.23 / np.sqrt(count)


class TestCompilation:
    @every(SAMPLERS)
    def test_new_parameters_do_not_recompile(self, name, x):
        grid = grid_of("edm")
        first = run(name, grid, x)
        num_traced = len(TRACED)
        other = run(name, grid, x, data=Data(*MIXTURE[:2], VAR))
        assert len(TRACED) == num_traced
        assert np.all(first != other)


class TestChurn:
    """Algorithm 2 of Karras et al. 2022, whose step itself is one of ``PATHS``."""

    @pytest.fixture(params=WITH_SIGNAL)
    def grid(self, request):
        return grid_of(request.param)

    @staticmethod
    def starts(grid, **options):
        """The nodes at the starts of steps, and σ/α there before and after it was raised."""
        nodes = heun(grid, **options).nodes
        nodes = type(nodes)(*(column[::2] for column in nodes))
        process = grid.process
        raised = process.sigma(nodes.time) / process.alpha(nodes.time)
        return nodes, grid.now.sigma / grid.now.alpha, raised

    def test_of_0_is_the_deterministic_method(self, grid):
        plain, other = heun(grid), heun(grid, 0.0, (0.5, 5.0), 1.2)
        jax.tree.map(np.testing.assert_array_equal, other.nodes, plain.nodes)
        assert other.step is plain.step

    def test_outside_its_range_changes_nothing(self, grid):
        plain, other = heun(grid), heun(grid, 3.0, (100.0, 200.0))
        jax.tree.map(np.testing.assert_array_equal, other.nodes, plain.nodes)

    def test_raises_the_noise_by_no_more_than_the_root_of_2(self, grid):
        _, before, raised = self.starts(grid, churn=1e9)
        np.testing.assert_allclose(raised, np.minimum(np.sqrt(2) * before, before[0]))

    def test_never_raises_it_above_the_start(self, grid):
        process = grid.process
        close = to_clean(process, process.time(np.array([-5.0, -4.9, -4.8, 2.0])))
        nodes, before, raised = self.starts(close, churn=1e9)
        np.testing.assert_allclose(raised[:3], before[0])
        assert nodes.raised[0] == 1
        assert nodes.noise[0] == 0

    def test_keeps_to_its_range(self, grid):
        low, high = 0.3, 4.0
        nodes, before, raised = self.starts(grid, churn=2.0, churn_range=(low, high))
        inside = (low <= before) & (before <= high)
        assert 0 < np.sum(inside) < 6
        np.testing.assert_array_equal(nodes.noise > 0, inside)
        np.testing.assert_allclose(raised / before, np.where(inside, 1 + 2 / 6, 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CountingDenoiser:
    """Predicts one more than it was told that it predicted last."""

    def __call__(self, xt, t, conditioning):
        return Prediction(x0=conditioning[X0_ESTIMATE] + 1, eps=xt)


class TestSelfConditioning:
    @every(["ddim", "heun", "unipc_2", "predictor_corrector"])
    def test_tells_the_last_estimate_and_0_at_first(self, name, x):
        sampler, x = SAMPLERS[name](grid_of("edm")), jnp.asarray(x)
        rows = sampler.num_evaluations
        run = jax.jit(partial(sample, sampler, num_snapshots=rows, self_condition=True))
        _, snapshots = run(CountingDenoiser(), x, keys_of(x), {})
        expected = np.broadcast_to(np.arange(1.0, rows + 1)[:, None, None], (rows, *x.shape))
        np.testing.assert_array_equal(snapshots.x0, expected)

    def test_keeps_what_else_is_given(self, x):
        told = []

        def denoiser(xt, t, conditioning):
            told.append(conditioning.keys())
            return Prediction(xt, xt)

        x, given = jnp.asarray(x), {"label": jnp.arange(4)}
        sampler = ddim(grid_of("edm"))
        sample(sampler, denoiser, x, keys_of(x), given, self_condition=True)
        sample(sampler, denoiser, x, keys_of(x), given)
        assert told[0] == {"label", X0_ESTIMATE}
        assert told[-1] == {"label"}


@pytest.mark.parametrize("sigma_min", np.geomspace(1e-10, 1e-9, 50))
def test_a_step_that_forgets_all_of_xt_survives_round_off(sigma_min):
    """β̃ of so long a step is σ_s², in floating-point numbers sometimes more."""
    grid = to_clean(edm(sigma_min), np.array([80.0, sigma_min]))
    assert np.all(ddim(grid, 1.0).nodes.coef_eps >= 0)


class TestErrors:
    @every([-0.1, 1.1], "eta")
    @every([ddim, dpmpp_2m], "solver")
    def test_eta_outside_0_to_1(self, solver, eta):
        with pytest.raises(ValueError, match=r"eta is .* in \[0, 1\]"):
            solver(grid_of("edm"), eta)

    @every([name for name in SAMPLERS if name not in DETERMINISTIC])
    def test_noise_on_the_way_to_noise(self, name):
        with pytest.raises(ValueError, match="towards noise"):
            SAMPLERS[name](evenly("edm", 2, -5, 4))

    def test_negative_churn(self):
        with pytest.raises(ValueError, match="churn is -1"):
            heun(grid_of("edm"), -1.0)

    def test_order_below_1(self):
        with pytest.raises(ValueError, match="order is 0"):
            unipc(grid_of("edm"), 0)

    def test_negative_variance(self):
        with pytest.raises(ValueError, match="negative"):
            ancestral(grid_of("edm"), np.array([1.0, 1.0, 1.0, 1.0, -1.0, 0.0]))
