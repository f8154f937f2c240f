"""Every target leads to the hub (x_0, ε) and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import GaussianDenoiser

from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.denoiser import ClippedDenoiser, NetworkDenoiser
from jax_ddpm.diffusion.likelihood import model_log_variance
from jax_ddpm.diffusion.parameterisation import TARGETS, Parameterisation
from jax_ddpm.diffusion.process import expand, q_sample
from jax_ddpm.diffusion.schedules import make_betas

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("target", TARGETS)
def test_delta_is_the_determinant(chain, points, target):
    a, b, delta = TARGETS[target](chain, points.t)
    determinant = chain.alpha(points.t) * b - chain.sigma(points.t) * a
    np.testing.assert_allclose(delta, determinant, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("target", TARGETS)
def test_round_trip(chain, points, target):
    x0, eps, xt, t = points
    parameterisation = Parameterisation(chain, target)
    prediction = parameterisation.to_prediction(
        parameterisation.regression_target(x0, eps, t), xt, t
    )
    # Where ᾱ = 0 neither ε nor the score knows x_0.
    solvable = TARGETS[target](chain, t).delta != 0
    assert np.all(solvable) or target in ("eps", "score")
    np.testing.assert_allclose(prediction.x0[solvable], x0[solvable], atol=1e-10)
    np.testing.assert_allclose(prediction.eps[solvable], eps[solvable], atol=1e-10)
    assert prediction.variance_fraction is None


@pytest.mark.parametrize("target", TARGETS)
def test_float32_errs_by_round_off_times_the_condition(chain, points, target):
    """Each product in (b·x_t - σ·y)/Δ and (α·y - a·x_t)/Δ is rounded; Δ then divides the error."""
    x0, eps, _, t = (array.astype(jnp.float32) for array in points)
    parameterisation = Parameterisation(chain, target)
    xt = q_sample(chain, x0, t, eps)
    prediction = parameterisation.to_prediction(
        parameterisation.regression_target(x0, eps, t), xt, t
    )
    assert prediction.x0.dtype == prediction.eps.dtype == jnp.float32

    a, b, delta = (np.abs(c)[:, None] for c in TARGETS[target](chain, points.t))
    alpha, sigma = chain.alpha(points.t)[:, None], chain.sigma(points.t)[:, None]
    solvable = delta[:, 0] != 0
    size_xt, size_y = (
        signal * np.abs(points.x0) + noise * np.abs(points.eps)
        for signal, noise in ((alpha, sigma), (a, b))
    )
    for actual, expected, bound in (
        (prediction.x0, x0, b * size_xt + sigma * size_y),
        (prediction.eps, eps, alpha * size_y + a * size_xt),
    ):
        error = np.abs(np.subtract(actual, expected, dtype=float))[solvable]
        assert np.all(error <= 8 * 2**-24 * (bound / delta)[solvable])


def test_posterior_mean_amplifies_errors_7800_times():
    chain = Chain(make_betas("linear", 1000))
    np.testing.assert_allclose(1 / chain.posterior.coef_x0.min(), 7800, rtol=0.01)


def test_posterior_mean_target_is_the_posterior_mean(chain, points):
    x0, eps, xt, t = points
    expected = expand(chain.gather(chain.posterior.coef_x0, t), x0) * x0
    expected += expand(chain.gather(chain.posterior.coef_xt, t), x0) * xt
    actual = Parameterisation(chain, "posterior_mean").regression_target(x0, eps, t)
    np.testing.assert_allclose(actual, expected, atol=1e-14)


def test_score_of_gaussian_data_is_its_exact_denoiser(chain, points):
    """∇ log N(x_t; α·mean, α²·var + σ²), not ε, comes out of the network."""
    mean, var = 0.3, 0.25

    def score(params, xt, time, conditioning):
        alpha, sigma = expand(chain.alpha(time), xt), expand(chain.sigma(time), xt)
        return -(xt - alpha * mean) / (alpha**2 * var + sigma**2)

    network = NetworkDenoiser((), score, Parameterisation(chain, "score"))
    informed = slice(None, -1 if chain.alpha_bar[-1] == 0 else None)
    xt, t = points.xt[informed], points.t[informed]
    actual, expected = network(xt, t, {}), GaussianDenoiser(mean, var, chain)(xt, t, {})
    np.testing.assert_allclose(actual.x0, expected.x0, atol=1e-10)
    np.testing.assert_allclose(actual.eps, expected.eps, atol=1e-10)


class TestLearnedVariance:
    def predict(self, chain, points, variance, raw):
        """The log-variance of a network whose second half of channels is ``raw``."""
        parameterisation = Parameterisation(chain, variance=variance)
        output = jnp.concatenate([points.eps, jnp.broadcast_to(raw, points.eps.shape)], axis=-1)
        prediction = parameterisation.to_prediction(output, points.xt, points.t)
        np.testing.assert_allclose(prediction.eps[:-1], points.eps[:-1], rtol=1e-15)
        return model_log_variance(chain, prediction, points.t, "learned")

    def test_log_variance_comes_back_on_the_chain(self, chain, points, rng):
        raw = rng.uniform(-12, 1, points.eps.shape)
        actual = self.predict(chain, points, "learned", raw)
        np.testing.assert_allclose(actual, raw, atol=1e-13)

    def test_range_spans_smallest_to_largest(self, chain, points):
        smallest, middle, largest = (
            self.predict(chain, points, "learned_range", jnp.array(raw)) for raw in (-1.0, 0.0, 1.0)
        )
        for actual, expected in (
            (smallest, chain.posterior_log_variance),
            (largest, np.log(chain.betas)),
            (middle, (chain.posterior_log_variance + np.log(chain.betas)) / 2),
        ):
            np.testing.assert_allclose(actual, np.tile(expected[:, None], 3), rtol=1e-13)


@pytest.mark.parametrize("chain", ["linear"], indirect=True)
class TestDenoisers:
    def test_network_is_fed_scaled_times_one_per_example(self, chain):
        parameterisation = Parameterisation(chain, "x0", time_scale=10.0)
        denoiser = NetworkDenoiser(
            (), lambda params, x, time, conditioning: expand(time, x) + 0 * x, parameterisation
        )
        fed = jax.jit(lambda t: denoiser(jnp.zeros((2, 3)), t, {}).x0[:, 0])
        np.testing.assert_allclose(fed(7.0), [70, 70], rtol=1e-15)
        np.testing.assert_allclose(fed(np.array([7.0, 99.0])), [70, 990], rtol=1e-15)

    def test_new_parameters_do_not_recompile(self, chain, points):
        traces = []

        def apply(params, x, time, conditioning):
            traces.append(x.shape)
            return params * x

        @jax.jit
        def run(denoiser):
            return denoiser(points.xt, points.t, {}).x0

        parameterisation = Parameterisation(chain, "x0")
        for scale in (0.5, 2.0):
            x0 = run(NetworkDenoiser(jnp.array(scale), apply, parameterisation))
            np.testing.assert_allclose(x0, scale * points.xt, rtol=1e-15)
        assert len(traces) == 1

    def test_clipping_keeps_the_pair_consistent(self, chain, points):
        _, _, xt, t = points
        raw = GaussianDenoiser(0.0, 4.0, chain)(xt, t, {})
        prediction = ClippedDenoiser(GaussianDenoiser(0.0, 4.0, chain), chain)(xt, t, {})
        np.testing.assert_array_equal(prediction.x0, np.clip(raw.x0, -1, 1))
        assert np.any(prediction.x0 != raw.x0)
        alpha, sigma = expand(chain.alpha(t), xt), expand(chain.sigma(t), xt)
        np.testing.assert_allclose(alpha * prediction.x0 + sigma * prediction.eps, xt, atol=1e-14)

    def test_clipping_inside_the_range_changes_nothing(self, chain, points):
        inner = GaussianDenoiser(0.2, 1e-6, chain)
        raw, clipped = (d(points.xt, points.t, {}) for d in (inner, ClippedDenoiser(inner, chain)))
        assert np.all(np.abs(raw.x0) < 1)
        np.testing.assert_allclose(clipped.eps, raw.eps, atol=1e-11)
