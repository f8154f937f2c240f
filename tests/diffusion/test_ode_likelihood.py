"""Likelihoods of the probability-flow ODE against densities known in closed form."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from exact import GaussianDenoiser, MixtureDenoiser
from scipy.stats import multivariate_normal, norm

from jax_ddpm.diffusion import continuous
from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.continuous import ContinuousProcess, LinearLogSnr
from jax_ddpm.diffusion.denoiser import InProcess
from jax_ddpm.diffusion.ode_likelihood import dequantised_nll, ode_log_likelihood
from jax_ddpm.diffusion.parameterisation import Prediction
from jax_ddpm.diffusion.process import Process, expand
from jax_ddpm.diffusion.samplers.grid import along
from jax_ddpm.diffusion.samplers.heun import heun
from jax_ddpm.diffusion.samplers.scan import sample
from jax_ddpm.diffusion.schedules import make_betas

pytestmark = pytest.mark.usefixtures("x64")
quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

LINEAR = make_betas("linear", 1000)
PROCESSES = {
    "chain": Chain(LINEAR),
    "chain_without_signal": Chain(np.append(LINEAR[:-1], 1.0)),
    "vp_linear": continuous.vp_linear(),
    "vp_cosine": continuous.vp_cosine(),
    "edm": continuous.edm(),
    "ve": continuous.ve(),
    "rectified_flow": continuous.rectified_flow(),
}
COSINE, EDM = PROCESSES["vp_cosine"], PROCESSES["edm"]
MEAN, VAR = 0.4, 0.09


def keys(count):
    return jax.random.split(jax.random.key(0), count)


@partial(jax.jit, static_argnames=("process", "exact_trace", "tolerance"))
def run(process, denoiser, x, keys, given, *, exact_trace=False, tolerance=1e-8):
    fields = {"exact_trace": exact_trace, "rtol": tolerance, "atol": tolerance}
    return ode_log_likelihood(process, denoiser, x, keys, given, **fields)


def end_times(process):
    """Where the flow begins and ends: at most at σ/α = 10⁴."""
    times = np.array(process.time_range)
    if process.alpha(times)[1] == 0:
        times[1:] = process.time(np.array([-2 * np.log(1e4)]))
    return times


def ends(process):
    """α and s = σ/α there."""
    times = end_times(process)
    return process.alpha(times), process.sigma(times) / process.alpha(times)


def prior_std(process):
    """Of the noise where the flow ends."""
    return process.prior_std(end_times(process)[1])


def gaussian_flow(process, x, mean=MEAN, var=VAR):
    """log p(x) per dimension and x_T in closed form: (y - mean)/√(var + s²) is kept."""
    alpha, s = ends(process)
    std = np.sqrt(var + s**2)
    latent = alpha[1] * (mean + std[1] / std[0] * (x / alpha[0] - mean))
    stretch = alpha[1] / alpha[0] * std[1] / std[0]
    return norm.logpdf(latent, scale=prior_std(process)) + np.log(stretch), latent


@pytest.mark.parametrize("name", PROCESSES)
class TestGaussianData:
    def test_has_the_density_and_latents_of_its_affine_flow(self, name, rng):
        """That density includes the prior's difference from x_T of the data."""
        process, x = PROCESSES[name], MEAN + rng.standard_normal((5, 3))
        denoiser = GaussianDenoiser(MEAN, VAR, process)
        found = run(process, denoiser, jnp.asarray(x), keys(5), {})
        log_p, latent = gaussian_flow(process, x)
        np.testing.assert_allclose(found.log_p, log_p.sum(axis=1), rtol=1e-6)
        np.testing.assert_allclose(found.latent, latent, rtol=1e-6, atol=1e-7)

    def test_is_that_of_the_least_noisy_time(self, name, rng):
        """N(α·mean, α²·var + σ²), up to what is left of the data in x_T."""
        process, (alpha, s) = PROCESSES[name], ends(PROCESSES[name])
        centre, std = alpha[0] * MEAN, alpha[0] * np.sqrt(VAR + s[0] ** 2)
        z = rng.uniform(-2, 2, (5, 3))
        denoiser = GaussianDenoiser(MEAN, VAR, process)
        found = run(process, denoiser, jnp.asarray(centre + std * z), keys(5), {})
        # To first order: x_T is shifted by mean/s of its deviations, and of another width.
        width = np.log(alpha[1] * np.sqrt(VAR + s[1] ** 2) / prior_std(process))
        expected = z * MEAN / s[1] + (z**2 - 1) * width
        error = found.log_p - norm.logpdf(centre + std * z, centre, std).sum(axis=1)
        assert np.all(np.abs(error) < 0.02)
        np.testing.assert_allclose(error, -expected.sum(axis=1), atol=2e-4)


WEIGHTS, CENTRES = np.array([0.3, 0.7]), np.array([-0.5, 0.4])


def mixture_denoiser(process):
    return MixtureDenoiser(jnp.asarray(WEIGHTS), jnp.asarray(CENTRES), 0.01, process)


def components(y, s):
    """[n, 2]: y among each of the two components of y_0 + s·ε, in its deviations."""
    return (y[:, None] - CENTRES) / np.sqrt(0.01 + s**2)


class TestMixture:
    @pytest.fixture(scope="class")
    @staticmethod
    def x():
        return np.linspace(-1.5, 1.5, 301)

    @pytest.fixture(scope="class")
    @staticmethod
    def found(x):
        with jax.enable_x64(True):
            return run(EDM, mixture_denoiser(EDM), jnp.asarray(x[:, None]), keys(301), {})

    def test_density_integrates_to_one(self, x, found):
        np.testing.assert_allclose(np.trapezoid(np.exp(found.log_p), x), 1, rtol=1e-6)

    def test_density_is_its_closed_form(self, x, found):
        """It holds up to what is left of the data in x_T."""
        _, s = ends(EDM)
        density = norm.pdf(components(x, s[0])) @ WEIGHTS / np.sqrt(0.01 + s[0] ** 2)
        spread = 1 + np.abs(found.latent[:, 0]) / s[1]
        error = np.abs(found.log_p - np.log(density))
        assert np.all(error < spread * np.abs(CENTRES).max() / s[1])

    def test_latents_are_at_the_same_quantile(self, x, found):
        """The flow of one dimension keeps the order of points, and so the distribution function."""
        _, s = ends(EDM)
        quantile = norm.cdf(components(x, s[0])) @ WEIGHTS
        of_latent = norm.cdf(components(np.asarray(found.latent)[:, 0], s[1])) @ WEIGHTS
        np.testing.assert_allclose(of_latent, quantile, atol=1e-7)

    def test_latents_are_those_of_a_fine_encoding(self, x, found):
        rising = np.geomspace(*EDM.time_range, 4000)
        encode = jax.jit(partial(sample, heun(along(EDM, rising))))
        some = jnp.asarray(x[::60, None])
        encoded, _ = encode(mixture_denoiser(EDM), some, keys(len(some)), {})
        np.testing.assert_allclose(found.latent[::60], encoded, rtol=1e-4)

    def test_density_is_the_same_in_any_process(self, rng):
        """It is that of y = x/α, under all scalings and schedules with the same ends of λ."""
        straight = continuous.Straight()
        times = tuple(straight.time(np.array([15.0, -15.0])).tolist())
        y = rng.uniform(-1, 1, (6, 1))
        found = []
        for process in (
            COSINE,
            ContinuousProcess(LinearLogSnr(-15.0, 15.0), "variance_exploding", (0.0, 1.0)),
            ContinuousProcess(straight, "flow", times),
        ):
            alpha = ends(process)[0][0]
            denoiser = InProcess(mixture_denoiser(COSINE), COSINE, process)
            result = run(process, denoiser, jnp.asarray(alpha * y), keys(6), {})
            found.append(np.asarray(result.log_p) + np.log(alpha))
        np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=1e-5)


COVARIANCE = np.array([[0.5, -0.3], [-0.3, 0.4]])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CorrelatedDenoiser:
    """The exact denoiser of x_0 ~ N(0, COVARIANCE): E[ε | x_t] = s·(COVARIANCE + s²)⁻¹·y."""

    process: Process = dataclasses.field(metadata={"static": True})

    def __call__(self, xt, t, conditioning):
        alpha, s = (expand(f(t), xt) for f in (self.process.alpha, self.process.sigma))
        y, s = xt / alpha, s / alpha
        variances, axes = map(jnp.asarray, np.linalg.eigh(COVARIANCE))
        eps = s * ((y @ axes) / (variances[None] + s**2)) @ axes.T
        return Prediction(y - s * eps, eps)


class TestCorrelatedData:
    def test_has_its_density(self, rng):
        x = rng.multivariate_normal(np.zeros(2), COVARIANCE, 6)
        denoiser = CorrelatedDenoiser(COSINE)
        found = run(COSINE, denoiser, jnp.asarray(x), keys(6), {}, exact_trace=True)
        alpha, s = ends(COSINE)
        least_noisy = multivariate_normal(cov=alpha[0] ** 2 * (COVARIANCE + s[0] ** 2 * np.eye(2)))
        np.testing.assert_allclose(found.log_p, least_noisy.logpdf(x), atol=10 * alpha[1] ** 2)

    def test_probes_are_unbiased(self):
        """vᵀJv of a symmetric J of two dimensions is its trace ± twice its corner: two values."""
        count = 1000
        denoiser = CorrelatedDenoiser(COSINE)
        x = jnp.tile(jnp.array([0.3, -0.2]), (count, 1))
        exact = run(COSINE, denoiser, x[:1], keys(1), {}, exact_trace=True).log_p
        off = np.asarray(run(COSINE, denoiser, x, keys(count), {}).log_p) - exact
        np.testing.assert_allclose(np.abs(off), np.abs(off[0]), rtol=1e-5)
        assert np.abs(off[0]) > 0.1
        np.testing.assert_allclose(off.mean(), 0, atol=5 * off.std() / np.sqrt(count))

    def test_the_batch_around_an_example_does_not_matter(self):
        """The tolerance is loose, so that steps shared with the others would show."""
        denoiser = CorrelatedDenoiser(COSINE)
        x = jnp.array([[0.3, -0.2], [500.0, 3.0], [0.0, 0.01]])
        whole = run(COSINE, denoiser, x, keys(3), {}, tolerance=1e-2)
        alone = run(COSINE, denoiser, x[:1], keys(3)[:1], {}, tolerance=1e-2)
        np.testing.assert_allclose(whole.log_p[0], alone.log_p[0], rtol=1e-10)


def test_one_probe_is_exact_where_all_axes_are_alike(rng):
    x = jnp.asarray(rng.standard_normal((3, 2, 2, 1)))
    denoiser = GaussianDenoiser(MEAN, VAR, EDM)
    found, exact = (run(EDM, denoiser, x, keys(3), {}, exact_trace=e) for e in (False, True))
    np.testing.assert_allclose(found.log_p, exact.log_p, rtol=1e-9)


def test_each_example_has_its_own_conditioning():
    @jax.tree_util.Partial
    def denoiser(xt, t, conditioning):
        return GaussianDenoiser(conditioning["mean"][:, None], VAR, EDM)(xt, t, {})

    x, mean = np.full((3, 2), 0.1), np.array([-0.5, 0.0, 0.7])
    found = run(EDM, denoiser, jnp.asarray(x), keys(3), {"mean": jnp.asarray(mean)})
    log_p, _ = gaussian_flow(EDM, x, mean[:, None])
    np.testing.assert_allclose(found.log_p, log_p.sum(axis=1), rtol=1e-6)


def test_runs_in_the_type_of_x():
    x = jnp.full((2, 3), 0.2, jnp.float32)
    found = run(COSINE, GaussianDenoiser(MEAN, VAR, COSINE), x, keys(2), {}, tolerance=1e-5)
    assert found.log_p.dtype == found.latent.dtype == jnp.float32
    log_p, _ = gaussian_flow(COSINE, np.full((2, 3), 0.2))
    np.testing.assert_allclose(found.log_p, log_p.sum(axis=1), rtol=1e-3)


@pytest.mark.parametrize(("num_levels", "gap"), [(9, 0.13), (256, 0.005)])
def test_bits_of_levels_are_above_their_entropy_by_what_the_bins_flatten(num_levels, gap):
    """Levels of a Gaussian, each in proportion to its probability.

    A uniform u adds w²/12 to the second moment, of which the mean of log p(x + u) is linear.
    """
    width, mean, std = 2 / (num_levels - 1), 0.05, 0.2
    edges = np.linspace(-1, 1, num_levels + 1) * (1 + width / 2)
    share = np.diff(norm.cdf(edges, mean, std))
    times = np.round(20_000 * share).astype(int)
    levels = np.repeat(np.linspace(-1, 1, num_levels), times)
    x0 = np.random.default_rng(0).permutation(levels)[: len(levels) // 10 * 10].reshape(10, -1)

    def nll(x0, keys):
        denoiser = GaussianDenoiser(mean, std**2, EDM)
        return dequantised_nll(EDM, denoiser, x0, keys, {}, num_levels)

    bits = np.asarray(jax.jit(nll)(jnp.asarray(x0), keys(10))) / np.log(2)

    share = times[times > 0] / times.sum()
    entropy = -np.sum(share * np.log2(share))
    var = std**2 + EDM.time_range[0] ** 2
    moment = np.mean((x0 - mean) ** 2) + width**2 / 12
    expected = np.log2(2 * np.pi * var) / 2 + moment / (2 * var * np.log(2)) - np.log2(width)
    # log p(x + u) moves by (x - mean)·u/var, of which the deviation is std·w/√12/var.
    error = width / np.sqrt(12) / std / np.log(2) / np.sqrt(x0.size)
    np.testing.assert_allclose(bits.mean(), expected, atol=5 * error + 2e-4)
    assert entropy < bits.mean() < entropy + gap
