"""Every weighting against its definition by another route."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_ddpm.diffusion.continuous import edm, rectified_flow, ve, vp_cosine
from jax_ddpm.diffusion.likelihood import bound_term
from jax_ddpm.diffusion.losses import OWN_TARGET, WEIGHTINGS, weighted_error
from jax_ddpm.diffusion.parameterisation import TARGETS, Parameterisation, Prediction
from jax_ddpm.diffusion.process import expand, q_sample

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


CONTINUOUS = {
    "vp_cosine": vp_cosine(),
    "ve": ve(),
    "edm": edm(),
    "rectified_flow": rectified_flow(),
}
CHAIN_ONLY = {"posterior_mean", "vlb"}
OF_ANY_PROCESS = [name for name in WEIGHTINGS if name not in CHAIN_ONLY]
every_process = pytest.mark.parametrize("process", CONTINUOUS.values(), ids=CONTINUOUS.keys())


class TestContinuousTime:
    @pytest.fixture
    def t(self, process):
        """Times from the cleanest to almost the noisiest: a flow ends without signal."""
        low, high = process.time_range
        return jnp.linspace(low, high, 41)[:-1]

    @pytest.fixture
    def pairs(self, process, t, rng):
        """The true (x_0, ε), and a wrong one at the same x_t."""
        x0, eps, wrong = jnp.asarray(rng.standard_normal((3, len(t), 3)))
        xt = q_sample(process, x0, t, eps)
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        return (x0, eps), ((xt - sigma * wrong) / alpha, wrong)

    @pytest.fixture
    def loss_of(self, process, t, pairs):
        """The loss of a network that predicts the wrong pair."""

        def loss(target, weighting, data_std=1.0):
            parameterisation = Parameterisation(process, target, data_std=data_std)
            truth, y = (parameterisation.regression_target(x0, eps, t) for x0, eps in pairs)
            return weighted_error(parameterisation, weighting, y, truth, t)

        return loss

    @every_process
    @pytest.mark.parametrize("name", ["simple", "snr", "truncated_snr", "min_snr", "p2"])
    def test_as_a_weight_on_the_x0_error(self, process, t, pairs, loss_of, name):
        snr = np.square(process.alpha(t) / process.sigma(t))
        weight = {
            "simple": snr,
            "snr": snr,
            "truncated_snr": np.maximum(snr, 1),
            "min_snr": np.minimum(snr, 5),
            "p2": snr / (1 + snr),
        }[name]
        (x0, _), (wrong, _) = pairs
        np.testing.assert_allclose(loss_of("x0", name), weight * square(x0 - wrong), rtol=1e-9)

    @every_process
    @pytest.mark.parametrize("weighting", OF_ANY_PROCESS)
    def test_loss_is_the_same_in_every_target(self, process, loss_of, weighting):
        expected = loss_of("eps", weighting)
        for target in TARGETS.keys() - CHAIN_ONLY:
            loss = loss_of(target, weighting, data_std=0.5)
            np.testing.assert_allclose(loss, expected, rtol=1e-7, err_msg=target)

    @every_process
    @pytest.mark.parametrize(("target", "name"), [("eps", "simple"), ("x0", "x0"), ("v", "v")])
    def test_own_target_is_the_weighting_of_its_name(self, process, loss_of, target, name):
        loss = loss_of(target, OWN_TARGET)
        np.testing.assert_allclose(loss, loss_of(target, name), rtol=1e-12)

    @pytest.mark.parametrize("process", [edm()])
    def test_edm_own_target_is_edm_loss(self, process, t, pairs, loss_of):
        """λ(σ)·‖D - x_0‖² with λ = (σ² + σ_data²)/(σ·σ_data)² (Karras et al. 2022, table 1)."""
        data_std = 0.5
        weight = (t**2 + data_std**2) / (t * data_std) ** 2
        (x0, _), (wrong, _) = pairs
        loss = loss_of("edm", OWN_TARGET, data_std)
        np.testing.assert_allclose(loss, weight * square(x0 - wrong), rtol=1e-9)

    @pytest.mark.parametrize("process", [rectified_flow()])
    def test_velocity_own_target_is_flow_matching(self, process, t, pairs, loss_of):
        """‖u - (ε - x_0)‖² (Lipman et al. 2023), which is the ε-error over (1-t)²."""
        (x0, eps), (wrong_x0, wrong_eps) = pairs
        loss = loss_of("velocity", OWN_TARGET)
        np.testing.assert_allclose(loss, square(eps - x0 - wrong_eps + wrong_x0), rtol=1e-12)
        np.testing.assert_allclose(loss, square(eps - wrong_eps) / (1 - t) ** 2, rtol=1e-9)

    @every_process
    @pytest.mark.parametrize("weighting", [*OF_ANY_PROCESS, OWN_TARGET])
    @pytest.mark.parametrize("target", ["x0", "v", "velocity", "edm"])
    def test_float32_losses_are_finite_at_both_ends(self, process, target, weighting):
        """They are finite even where a flow ends without signal."""
        t = jnp.asarray(process.time_range, jnp.float32)
        wrong = jnp.ones((2, 1), jnp.float32)
        loss = weighted_error(Parameterisation(process, target), weighting, wrong, 0 * wrong, t)
        assert loss.dtype == jnp.float32
        assert np.all(np.isfinite(loss))


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
