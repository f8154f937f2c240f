"""The bound's terms against 50 digits, and the whole of it against an entropy known exactly."""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import GaussianDenoiser
from mpmath import mp
from scipy.integrate import quad
from scipy.stats import norm

from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.likelihood import (
    bound_term,
    discrete_decoder_log_likelihood,
    gaussian_kl,
    model_log_variance,
    prior_term,
    variational_bound,
)
from jax_ddpm.diffusion.parameterisation import Prediction
from jax_ddpm.diffusion.schedules import make_betas

mp.dps = 50


class TestGaussianKL:
    @pytest.mark.parametrize(
        ("mean_q", "std_q", "mean_p", "std_p"),
        [(0.0, 1.0, 0.0, 1.0), (0.3, 0.5, -0.2, 0.7), (1.0, 2.0, 1.0, 0.5), (-2.0, 0.1, -1.9, 0.1)],
    )
    def test_is_the_integral_of_q_log_q_over_p(self, mean_q, std_q, mean_p, std_p, x64):
        q, p = norm(mean_q, std_q), norm(mean_p, std_p)
        integral, _ = quad(
            lambda x: q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), *q.interval(1 - 1e-14), epsabs=1e-13
        )
        arguments = (mean_q, 2 * np.log(std_q), mean_p, 2 * np.log(std_p))
        kl = gaussian_kl(*map(jnp.asarray, arguments))
        np.testing.assert_allclose(kl, integral, atol=1e-10)

    def test_of_equals_is_exactly_zero(self, rng):
        moments = [jnp.asarray(rng.normal(0, 3, 100), jnp.float32) for _ in range(2)]
        np.testing.assert_array_equal(gaussian_kl(*moments, *moments), 0)

    def test_of_nearly_equal_variances_keeps_its_precision(self):
        """½(exp(r) - 1 - r) → r²/4: lost to round-off in float32 if the 1 were subtracted last."""
        r = jnp.float32(1e-2)
        kl = gaussian_kl(jnp.float32(0), r, jnp.float32(0), jnp.float32(0))
        np.testing.assert_allclose(kl, (np.expm1(1e-2) - 1e-2) / 2, rtol=1e-4)


# Far outside the data's range, at a level, at the edge of a bin; the chain's extremes and beyond.
MEANS = [-1e3, -30.0, -1.7, -1.0, -1 + 1 / 255, 0.0, 0.21, 1.0, 1.4]
LOG_VARIANCES = [-20.0, -9.8, -4.0, 0.0, 3.0, 10.0]


class Decoded(NamedTuple):
    """Arguments, values and gradients of the decoder, [mean, log-variance, level]."""

    x0: np.ndarray
    mean: np.ndarray
    log_variance: np.ndarray
    log_p: np.ndarray
    mean_gradient: np.ndarray
    log_variance_gradient: np.ndarray


@cache
def decode(num_levels, dtype):
    """The decoder at every mean, log-variance and level."""
    grid = np.meshgrid(MEANS, LOG_VARIANCES, np.linspace(-1, 1, num_levels), indexing="ij")
    mean, log_variance, x0 = (jnp.asarray(axis, dtype) for axis in grid)

    @jax.jit
    @partial(jax.grad, argnums=(0, 1), has_aux=True)
    def run(mean, log_variance):
        log_p = discrete_decoder_log_likelihood(x0, mean, log_variance, num_levels)
        return log_p.sum(), log_p

    gradients, log_p = run(mean, log_variance)
    assert log_p.dtype == dtype
    return Decoded(*map(np.asarray, (x0, mean, log_variance, log_p, *gradients)))


@pytest.mark.usefixtures("x64")
class TestDiscreteDecoder:
    @pytest.mark.parametrize(
        ("num_levels", "dtype", "tolerance"),
        [(17, "float32", 1e-5), (256, "float32", 1e-5), (256, "float64", 1e-12)],
    )
    def test_all_levels_sum_to_one(self, num_levels, dtype, tolerance):
        total = np.exp(decode(num_levels, dtype).log_p).sum(axis=-1)
        np.testing.assert_allclose(total, 1, rtol=tolerance)

    def test_is_the_normal_probability_of_the_bin(self):
        """Far into both tails: the smallest probability here is exp(-2e14)."""
        half_bin = mp.mpf(1) / 255

        def log_probability(x0, mean, log_variance):
            scale = mp.exp(-mp.mpf(log_variance) / 2)
            lower = -mp.inf if x0 == -1 else (x0 - half_bin - mp.mpf(mean)) * scale
            upper = mp.inf if x0 == 1 else (x0 + half_bin - mp.mpf(mean)) * scale
            if lower > 0:  # the smaller of the two tails
                lower, upper = -upper, -lower
            return float(mp.log(mp.ncdf(upper) - mp.ncdf(lower)))

        # Every 17th level, the first and the last among them.
        some = Decoded(*(array[..., ::17] for array in decode(256, "float64")))
        expected = np.vectorize(log_probability)(some.x0, some.mean, some.log_variance)
        np.testing.assert_allclose(some.log_p, expected, rtol=1e-11, atol=1e-14)

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_values_and_gradients_are_finite(self, dtype):
        for array in decode(256, dtype):
            assert np.all(np.isfinite(array))

    def test_float32_gradients_agree_where_the_chain_decodes(self):
        """The chain decodes at log β̃_1 = -9.8 and above, for means in the data's range."""
        mean, log_variance = np.abs(MEANS) <= 1, np.array(LOG_VARIANCES) >= -9.8
        for name in ("mean_gradient", "log_variance_gradient"):
            single, double = (
                getattr(decode(256, dtype), name)[np.ix_(mean, log_variance)]
                for dtype in ("float32", "float64")
            )
            np.testing.assert_allclose(single, double, rtol=0.01, atol=0.01, err_msg=name)


class TestPriorTerm:
    def test_closed_form(self, chain, rng, x64):
        """KL(N(√ᾱ·x_0, 1-ᾱ) ‖ N(0, 1)), averaged over dimensions."""
        x0 = rng.uniform(-1, 1, (4, 6))
        alpha_bar = mp.mpf(1)
        for beta in chain.betas:
            alpha_bar *= 1 - mp.mpf(beta)
        expected = [(alpha_bar * (np.mean(x**2) - 1) - mp.log(1 - alpha_bar)) / 2 for x in x0]
        actual = prior_term(chain, jnp.asarray(x0))
        np.testing.assert_allclose(actual, np.array(expected, float), rtol=1e-9, atol=1e-16)

    def test_papers_figure(self, rng):
        """L_T of linear T = 1000 is 7-10e-6 bits/dim where E[x_0²] is about a quarter."""
        x0 = jnp.asarray(rng.choice([-0.5, 0.5], (2, 100)), jnp.float32)
        bits = np.asarray(prior_term(Chain(make_betas("linear", 1000)), x0)) / np.log(2)
        assert np.all((bits > 7e-6) & (bits < 10e-6))


class TestBoundTerm:
    def terms(self, chain, points, prediction, variance):
        x0 = jnp.round(points.x0 * 8).clip(-8, 8) / 8  # on 17 levels
        return bound_term(chain, prediction(x0), x0, points.xt, points.t, variance, 17)

    def test_of_the_truth_is_zero_after_the_decoder(self, chain, points):
        terms = self.terms(chain, points, lambda x0: Prediction(x0, points.eps), "fixedsmall")
        assert np.all(terms[1:] == 0)
        assert terms[0] > 0

    def test_of_the_true_mean_leaves_the_variances_divergence(self, chain, points):
        """KL(N(0, β̃) ‖ N(0, β)) for fixedlarge."""
        terms = self.terms(chain, points, lambda x0: Prediction(x0, points.eps), "fixedlarge")
        ratio = chain.posterior.variance[1:] / chain.betas[1:]
        np.testing.assert_allclose(
            terms[1:], (ratio - 1 - np.log(ratio)) / 2, rtol=1e-8, atol=1e-14
        )

    def test_the_decoder_has_the_smallest_variance_under_both(self, chain, points):
        small, large = (
            self.terms(chain, points, lambda x0: Prediction(0.9 * x0, points.eps), variance)
            for variance in ("fixedsmall", "fixedlarge")
        )
        assert small[0] == large[0]
        assert np.all(small[1:] != large[1:])

    def test_fixed_log_variances(self, chain, points):
        prediction = Prediction(points.x0, points.eps)
        small, large = (
            model_log_variance(chain, prediction, points.t, variance)[:, 0]
            for variance in ("fixedsmall", "fixedlarge")
        )
        np.testing.assert_array_equal(small, chain.posterior_log_variance)
        np.testing.assert_array_equal(large[1:], np.log(chain.betas[1:]))
        assert large[0] == small[0]


STD = 0.25
SHORT = Chain(make_betas("linear", 100))
DENOISER = GaussianDenoiser(0.0, STD**2, SHORT)
SMALLEST, LARGEST = np.zeros(100), np.ones(100)


@jax.jit
def bound_jit(x0, keys, denoiser, fraction):
    def with_variance(xt, t, conditioning):
        of_t = jnp.broadcast_to(fraction[t.astype(int)][:, None], xt.shape)
        return denoiser(xt, t, conditioning)._replace(variance_fraction=of_t)

    return variational_bound(SHORT, with_variance, x0, keys, {}, "learned", num_levels=256)


def bound(x0, keys, denoiser=DENOISER, fraction=SMALLEST):
    """The bound with log-variances a fraction ``[T]`` of the way from log β̃ to log β."""
    return bound_jit(x0, keys, denoiser, fraction)


class TestVariationalBound:
    """The data is N(0, s²) rounded to 256 levels, whose every probability is known."""

    @pytest.fixture
    def x0(self, rng):
        levels = np.linspace(-1, 1, 256, dtype=np.float32)
        return levels[np.abs(rng.normal(0, STD, (128, 64, 1)) - levels).argmin(-1)]

    @pytest.fixture
    def keys(self, x0):
        return jax.random.split(jax.random.key(0), len(x0))

    def excess(self, bound, x0):
        """Mean and standard error of the bound's excess over -log p(x_0), in nats/dim."""
        edges = np.concatenate([[-np.inf], np.linspace(-1, 1, 256)[1:] - 1 / 255, [np.inf]])
        log_p = np.log(np.diff(norm.cdf(edges / STD)))
        excess = np.asarray(bound.total) + log_p[np.rint((x0 + 1) * 127.5).astype(int)].mean(axis=1)
        return excess.mean(), excess.std() / np.sqrt(len(excess))

    @pytest.mark.parametrize("fraction", [SMALLEST, LARGEST], ids=["smallest", "largest"])
    def test_bounds_the_entropy(self, x0, keys, fraction):
        """The bound is strict: neither β̃ nor β is the variance of this data's reverse chain."""
        mean, error = self.excess(bound(x0, keys, fraction=fraction), x0)
        assert mean > 4 * error

    def test_is_tight_with_the_optimal_variance(self, x0, keys):
        """The model is the exact reverse of Gaussian data at variance β̃ + c_0²·Var(x_0 | x_t).

        Only the rounding of x_0 is left: 4e-5 nats by quadrature.
        """
        unknown = STD**2 * SHORT.one_minus_alpha_bar / (SHORT.alpha_bar * (STD**2 - 1) + 1)
        optimal = SHORT.posterior.variance + SHORT.posterior.coef_x0**2 * unknown
        smallest = SHORT.posterior_log_variance
        fraction = (np.log(optimal) - smallest) / (np.log(SHORT.betas) - smallest)
        mean, error = self.excess(bound(x0, keys, fraction=fraction), x0)
        assert error < 0.02, "sharp enough to tell: β̃ exceeds by 1 nat, β by a tenth"
        assert abs(mean) < 4 * error + 1e-4

    def test_terms_follow_their_expectation(self, x0, keys):
        """A linear x̂_0 = g·x_t errs by (1-g·√ᾱ)²·x_0² + g²·(1-ᾱ), and the KL is c_0²/(2β̃) of it."""
        terms = bound(x0, keys)
        alpha_bar = np.cumprod(1 - SHORT.betas)
        noise = 1 - alpha_bar
        gain = np.sqrt(alpha_bar) * STD**2 / (alpha_bar * STD**2 + noise)
        mse = (1 - gain * np.sqrt(alpha_bar)) ** 2 * np.mean(x0**2) + gain**2 * noise
        five_errors = 5 * np.sqrt(2 / x0.size)  # of a mean of squares, relative
        np.testing.assert_allclose(terms.x0_mse.mean(0), mse, rtol=five_errors)
        kl = (SHORT.posterior.coef_x0**2 * mse)[1:] / (2 * SHORT.posterior.variance[1:])
        np.testing.assert_allclose(terms.steps.mean(0)[1:], kl, rtol=five_errors)

    def test_total_is_steps_and_prior(self, x0, keys):
        terms = bound(x0, keys)
        assert terms.steps.shape == terms.x0_mse.shape == (128, 100)
        np.testing.assert_allclose(terms.prior, prior_term(SHORT, jnp.asarray(x0)), rtol=1e-6)
        expected = np.sum(terms.steps, axis=1) + terms.prior
        np.testing.assert_allclose(terms.total, expected, rtol=1e-6)

    def test_x0_mse_of_a_constant_prediction(self, x0, keys):
        """Data without variance are known to be their mean, whatever x_t."""
        terms = bound(x0, keys, GaussianDenoiser(0.5, 0.0, SHORT))
        expected = np.mean((0.5 - x0) ** 2, axis=1, keepdims=True)
        np.testing.assert_allclose(terms.x0_mse, np.tile(expected, 100), rtol=1e-5)

    def test_noise_depends_on_the_examples_own_key_alone(self, x0, keys):
        """An example's terms are the same in reverse order and in other company."""
        other_x0 = np.where(np.arange(128)[:, None] < 64, 0, x0)
        both = zip(bound(x0, keys), bound(other_x0[::-1], keys[::-1]), strict=True)
        for terms, other in (map(np.asarray, pair) for pair in both):
            np.testing.assert_allclose(other[::-1][64:], terms[64:], rtol=1e-6)
