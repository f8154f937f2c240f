"""The predicted x_0 in the range of images, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import GaussianDenoiser

from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.denoiser import Denoiser
from jax_ddpm.diffusion.parameterisation import Prediction
from jax_ddpm.diffusion.process import noise_between, q_sample
from jax_ddpm.diffusion.schedules import make_betas
from jax_ddpm.diffusion.thresholding import ClippedDenoiser, ThresholdedDenoiser

pytestmark = pytest.mark.usefixtures("x64")

CHAIN = Chain(make_betas("linear", 100))
MODEL = GaussianDenoiser(0.2, 3.0, CHAIN)
KINDS = {
    "static": lambda model: ClippedDenoiser(model, CHAIN),
    "dynamic": lambda model: ThresholdedDenoiser(model, CHAIN, 0.9),
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


@pytest.fixture
def t():
    return jnp.array([0.0, 99, 3, 50, 20, 80])


@pytest.fixture
def xt(rng, t):
    x0, eps = rng.standard_normal((2, 6, 4, 3, 2))
    return q_sample(CHAIN, jnp.asarray(2 * x0), t, jnp.asarray(eps))


@every_kind
def test_is_a_denoiser(make):
    assert isinstance(make(MODEL), Denoiser)


@every_kind
def test_x0_is_in_range_and_eps_follows(make, xt, t):
    prediction = make(MODEL)(xt, t, {})
    assert np.abs(MODEL(xt, t, {}).x0).max() > 1.5
    np.testing.assert_allclose(np.abs(prediction.x0).max(), 1, rtol=1e-15)
    rebuilt = q_sample(CHAIN, prediction.x0, t, prediction.eps)
    np.testing.assert_allclose(rebuilt, xt, atol=1e-12)


@every_kind
def test_images_in_range_stay_as_they_are(make, xt, t):
    """They do even if an image next to them in the batch is not in range."""
    raw = MODEL(xt, t, {})
    gain = jnp.where(jnp.arange(6) == 2, 1.0, 0.99 / jnp.abs(raw.x0).max(axis=(1, 2, 3)))
    x0 = gain[:, None, None, None] * raw.x0
    small = Prediction(x0, noise_between(CHAIN, x0, xt, t))
    result = make(lambda *_: small)(xt, t, {})
    same = np.all(np.asarray(result.x0 == small.x0), axis=(1, 2, 3))
    np.testing.assert_array_equal(same, np.arange(6) != 2)
    np.testing.assert_allclose(result.eps[3], small.eps[3], rtol=1e-9)


@every_kind
def test_learned_variance_stays(make, xt, t):
    prediction = make(lambda *_: Prediction(xt, xt, 3 * xt))(xt, t, {})
    np.testing.assert_array_equal(prediction.variance_fraction, 3 * xt)


@every_kind
def test_a_time_for_all_is_the_same_as_one_for_each(make, xt):
    whole = make(MODEL)(xt, jnp.array(20.0), {})
    each = make(MODEL)(xt, jnp.full(6, 20.0), {})
    jax.tree.map(np.testing.assert_array_equal, whole, each)


@every_kind
def test_examples_do_not_touch_each_other(make, xt, t):
    whole, part = make(MODEL)(xt, t, {}), make(MODEL)(xt[4:], t[4:], {})
    np.testing.assert_allclose(part.x0, whole.x0[4:], rtol=1e-12)


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9, 0.995, 1.0])
def test_the_quantile_is_that_of_numpy(xt, t, quantile):
    """Each example has its own, over all pixels and channels."""
    raw = np.asarray(MODEL(xt, t, {}).x0)
    result = ThresholdedDenoiser(MODEL, CHAIN, quantile)(xt, t, {}).x0
    for before, after in zip(raw, result, strict=True):
        s = max(1, np.quantile(np.abs(before), quantile))
        np.testing.assert_allclose(after, np.clip(before, -s, s) / s, rtol=1e-12)


def test_quantile_0_is_static_thresholding_where_some_pixels_are_small(xt, t):
    dynamic = ThresholdedDenoiser(MODEL, CHAIN, 0.0)(xt, t, {})
    static = ClippedDenoiser(MODEL, CHAIN)(xt, t, {})
    jax.tree.map(np.testing.assert_array_equal, dynamic, static)


@pytest.mark.parametrize("quantile", [-0.1, 1.1])
def test_refuses_what_is_no_quantile(quantile):
    with pytest.raises(ValueError, match="quantile"):
        ThresholdedDenoiser(MODEL, CHAIN, quantile)
