"""Every weighting against its definition by another route."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_ddpm.diffusion.likelihood import bound_term
from jax_ddpm.diffusion.losses import WEIGHTINGS, weighted_error
from jax_ddpm.diffusion.parameterisation import TARGETS, Parameterisation, Prediction
from jax_ddpm.diffusion.process import expand

pytestmark = pytest.mark.usefixtures("x64")
paper_chains = pytest.mark.parametrize("chain", ["linear", "cosine"], indirect=True)


def square(error):
    return np.mean(np.square(error), axis=-1)


@pytest.fixture
def estimate(chain, points, rng):
    """A wrong but consistent hub pair at the points' x_t."""
    eps = points.eps + 0.1 * rng.standard_normal(points.eps.shape)
    alpha, sigma = (expand(level(points.t), eps) for level in (chain.alpha, chain.sigma))
    return Prediction(x0=(points.xt - sigma * eps) / alpha, eps=eps)


@pytest.fixture
def eps_error(points, estimate):
    return square(points.eps - estimate.eps)


@pytest.fixture
def x0_error(points, estimate):
    return square(points.x0 - estimate.x0)


@paper_chains
class TestWeightings:
    @pytest.mark.parametrize("target", ["x0", "v", "posterior_mean"])
    def test_plain_error_in_a_target(self, chain, points, estimate, eps_error, target):
        """w·‖ε - ε̂‖² is the squared error of what a network of that target regresses."""
        of_target = Parameterisation(chain, target).regression_target
        error = of_target(points.x0, points.eps, points.t) - of_target(*estimate[:2], points.t)
        weight = WEIGHTINGS[target](chain, points.t)
        np.testing.assert_allclose(weight * eps_error, square(error), rtol=1e-9)

    @pytest.mark.parametrize("name", ["simple", "snr", "truncated_snr", "min_snr", "p2"])
    def test_as_a_weight_on_the_x0_error(self, chain, points, eps_error, x0_error, name):
        snr = chain.alpha_bar / chain.one_minus_alpha_bar
        weight = {
            "simple": snr,
            "snr": snr,
            "truncated_snr": np.maximum(snr, 1),
            "min_snr": np.minimum(snr, 5),
            "p2": snr / (1 + snr),
        }[name]
        loss = WEIGHTINGS[name](chain, points.t) * eps_error
        np.testing.assert_allclose(loss, weight * x0_error, rtol=1e-9)

    def test_vlb_is_the_bound_term_of_fixedsmall(self, chain, points, estimate, eps_error):
        term = bound_term(chain, estimate, points.x0, points.xt, points.t, "fixedsmall", 256)
        loss = WEIGHTINGS["vlb"](chain, points.t) * eps_error
        np.testing.assert_allclose(loss[1:], term[1:], rtol=1e-8)

    def test_vlb_is_equation_12(self, chain, points):
        """β²/(2σ²·(1-β)·(1-ᾱ)) with σ² = β̃ (Ho et al. 2020)."""
        beta, alpha_bar = chain.betas[1:], np.cumprod(1 - chain.betas)
        variance = beta * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
        expected = beta**2 / (2 * variance * (1 - beta) * (1 - alpha_bar[1:]))
        np.testing.assert_allclose(WEIGHTINGS["vlb"](chain, points.t)[1:], expected, rtol=1e-9)

    @pytest.mark.parametrize("weighting", WEIGHTINGS)
    def test_loss_is_the_same_in_every_target(self, chain, points, estimate, eps_error, weighting):
        for target in TARGETS:
            parameterisation = Parameterisation(chain, target)
            truth, y = (
                parameterisation.regression_target(x0, eps, points.t)
                for x0, eps in (points[:2], estimate[:2])
            )
            loss = weighted_error(parameterisation, weighting, y, truth, points.t)
            expected = WEIGHTINGS[weighting](chain, points.t) * eps_error
            np.testing.assert_allclose(loss, expected, rtol=1e-7, err_msg=target)


def losses(chain, target, weighting):
    """The float32 loss of an error of 1 in the network's output, at every t."""
    t = jnp.arange(chain.num_timesteps, dtype=jnp.float32)
    wrong = jnp.ones((chain.num_timesteps, 1), jnp.float32)
    loss = weighted_error(Parameterisation(chain, target), weighting, wrong, 0 * wrong, t)
    assert loss.dtype == jnp.float32
    return loss


@paper_chains
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("target", TARGETS)
def test_float32_losses_are_finite_and_positive(chain, target, weighting):
    loss = losses(chain, target, weighting)
    assert np.all(np.isfinite(loss) & (loss > 0))


@pytest.mark.parametrize("chain", ["jsd"], indirect=True)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("target", ["x0", "v"])
def test_losses_are_finite_where_no_signal_is_left(chain, target, weighting):
    """ᾱ = 0 at the last step: networks that predict x_0 or v are trained there all the same."""
    assert np.all(np.isfinite(losses(chain, target, weighting)))
