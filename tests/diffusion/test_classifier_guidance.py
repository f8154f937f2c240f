"""Classifier guidance of Gaussian classes with the exact classifier, and what a trained one is fed.

With both parts exact, Bayes' rule makes scale 1 the exact model of the class.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from exact import GaussianDenoiser
from scipy.stats import kstest, norm

from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.continuous import edm, rectified_flow, vp_linear
from jax_ddpm.diffusion.denoiser import Denoiser
from jax_ddpm.diffusion.guidance import (
    Guidance,
    GuidanceInterval,
    LikelihoodGuidance,
    NoisyClassifier,
    RescaledGuidance,
)
from jax_ddpm.diffusion.parameterisation import Parameterisation, Prediction
from jax_ddpm.diffusion.process import Process, expand, q_sample
from jax_ddpm.diffusion.samplers.grid import log_snr_uniform, to_clean
from jax_ddpm.diffusion.samplers.heun import heun
from jax_ddpm.diffusion.samplers.scan import sample
from jax_ddpm.diffusion.schedules import make_betas

pytestmark = pytest.mark.usefixtures("x64")
quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

CHAIN = Chain(make_betas("linear", 100))
MEANS = np.array([[-0.6, 0.3], [0.1, 0.2], [0.9, -0.5]])  # of three classes, two pixels
WEIGHTS = np.array([0.5, 0.2, 0.3])
VAR = 0.04
SCALES = [0.0, 0.3, 1.0, 2.5]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Classes:
    """All that is known of x_0 ~ Σ_k WEIGHTS[k]·N(means[k], VAR)."""

    means: jax.Array
    process: Process = dataclasses.field(metadata={"static": True})

    def posterior(self, xt, t):
        """log p(k | x_t) ``[batch, classes]``."""
        t = jnp.broadcast_to(t, xt.shape[:1])
        alpha, sigma = self.process.alpha(t)[:, None, None], self.process.sigma(t)[:, None, None]
        error = xt[:, None] - alpha * self.means[None]
        log_p = -jnp.sum(error**2 / (2 * (alpha**2 * VAR + sigma**2)), axis=2)
        return jax.nn.log_softmax(log_p + jnp.log(jnp.asarray(WEIGHTS))[None])


class Mixture(Classes):
    """Their exact denoiser, told no class."""

    def __call__(self, xt, t, conditioning):
        share = jnp.exp(self.posterior(xt, t))
        of_class = [
            GaussianDenoiser(mean, VAR, self.process)(xt, t, {}) for mean in self.means[:, None]
        ]
        x0, eps = (
            jnp.einsum("bk,kbd->bd", share, jnp.stack([getattr(one, name) for one in of_class]))
            for name in ("x0", "eps")
        )
        return Prediction(x0, eps)


class Classifier(Classes):
    """Their exact classifier."""

    def __call__(self, xt, t, conditioning):
        log_p = self.posterior(xt, t)
        return jnp.take_along_axis(log_p, conditioning["label"][:, None], axis=1)[:, 0]


for kind in (Mixture, Classifier):
    jax.tree_util.register_dataclass(kind)


def guidance(scale, process=CHAIN, means=MEANS):
    means = jnp.asarray(means)
    return LikelihoodGuidance(Mixture(means, process), Classifier(means, process), process, scale)


@jax.jit
def run(denoiser, batch):
    return denoiser(*batch)


class Batch(NamedTuple):
    xt: jax.Array
    t: jax.Array
    given: dict


@pytest.fixture
def batch(rng):
    t = jnp.array([0.0, 99, 3, 50, 20, 80])
    label = np.arange(6) % 3
    x0 = MEANS[label] + np.sqrt(VAR) * rng.standard_normal((6, 2))
    xt = q_sample(CHAIN, jnp.asarray(x0), t, jnp.asarray(rng.standard_normal((6, 2))))
    return Batch(xt, t, {"label": jnp.asarray(label, jnp.int32)})


def exact(batch, process=CHAIN):
    """The prediction for the class of each example."""
    mean = jnp.asarray(MEANS)[batch.given["label"]]
    return GaussianDenoiser(mean, VAR, process)(*batch)


def test_is_a_denoiser_and_a_guidance():
    assert isinstance(guidance(2.0), Denoiser)
    assert isinstance(guidance(2.0), Guidance)


@pytest.mark.parametrize("process", [CHAIN, vp_linear(), edm(), rectified_flow()])
def test_scale_1_is_the_model_of_the_class(batch, process):
    share = batch.t / 100
    low, high = process.time_range
    now = batch._replace(t=low + (high - low) * share)
    guided, expected = run(guidance(1.0, process), now), exact(now, process)
    np.testing.assert_allclose(guided.x0, expected.x0, atol=1e-8)
    np.testing.assert_allclose(guided.eps, expected.eps, atol=1e-8)


@pytest.mark.parametrize("scale", SCALES)
def test_score_is_that_of_the_sharpened_class(batch, scale):
    """∇log p(x_t)·p(c | x_t)^scale lies between or beyond those of the mixture and the class."""
    plain, of_class = run(guidance(0.0).denoiser, batch), exact(batch)
    guided = run(guidance(scale), batch)
    for name in ("x0", "eps"):
        u, c = getattr(plain, name), getattr(of_class, name)
        np.testing.assert_allclose(getattr(guided, name), (1 - scale) * u + scale * c, atol=1e-10)


@pytest.mark.parametrize("scale", SCALES)
def test_x0_and_eps_agree_with_xt(batch, scale):
    guided = run(guidance(scale), batch)
    rebuilt = q_sample(CHAIN, guided.x0, batch.t, guided.eps)
    np.testing.assert_allclose(rebuilt, batch.xt, atol=1e-12)


def test_scale_0_is_the_model_itself_and_asks_no_classifier(batch):
    model = guidance(1.0).denoiser
    unguided = LikelihoodGuidance(model, None, CHAIN, 0.0)
    jax.tree.map(np.testing.assert_array_equal, run(unguided, batch), run(model, batch))


def test_any_likelihood_guides(batch):
    """A measurement y = x_t + N(0, 1) of mean zero adds the score -x_t."""
    guided = LikelihoodGuidance(
        GaussianDenoiser(0.0, 1.0, CHAIN), lambda x, t, _: -jnp.sum(x**2, axis=1) / 2, CHAIN, 2.0
    )(*batch)
    sigma = expand(CHAIN.sigma(batch.t), batch.xt)
    np.testing.assert_allclose(guided.eps, 3 * sigma * batch.xt, atol=1e-12)


@pytest.mark.parametrize("t", [0.0, 20.0, 99.0])
def test_a_time_for_all_is_the_same_as_one_for_each(batch, t):
    whole = run(guidance(2.5), batch._replace(t=jnp.array(t)))
    each = run(guidance(2.5), batch._replace(t=jnp.full(6, t)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10), whole, each)


def test_examples_do_not_touch_each_other(batch):
    """Each is the same in parts of the batch, and a change to one changes only that one."""
    plain = run(guidance(2.5), batch)
    for part in (slice(None, None, -1), slice(2), slice(5, None)):
        alone = run(guidance(2.5), jax.tree.map(lambda x, part=part: x[part], batch))
        np.testing.assert_allclose(alone.eps, plain.eps[part], rtol=1e-10)
    changed = {"label": batch.given["label"].at[2].add(-1)}
    other = run(guidance(2.5), batch._replace(given=changed))
    differs = np.any(np.asarray(other.eps != plain.eps), axis=1)
    np.testing.assert_array_equal(differs, np.arange(6) == 2)


def test_new_parameters_do_not_recompile(batch):
    run.clear_cache()
    first = run(guidance(2.5), batch)
    second = run(guidance(2.5, means=MEANS + 0.1), batch)
    assert run._cache_size() == 1
    assert np.all(np.asarray(second.eps != first.eps))


def test_nothing_is_moved_where_there_is_no_signal(batch):
    chain = Chain(np.append(CHAIN.betas[:-1], 1.0))
    model = GaussianDenoiser(0.3, VAR, chain)
    guided = LikelihoodGuidance(model, lambda x, t, _: jnp.sum(x, axis=1), chain, 2.0)
    same = guided(*batch).eps == model(*batch).eps
    np.testing.assert_array_equal(same.all(axis=1), batch.t == 99)
    np.testing.assert_array_equal(guided(*batch).x0[1], 0.3)


def test_can_be_rescaled_and_limited_to_an_interval(batch):
    """As for every guidance: to the standard deviation, or to all, of the unguided model."""
    guided, plain = run(guidance(2.5), batch), run(guidance(2.5).denoiser, batch)
    rescaled = run(RescaledGuidance(guidance(2.5), CHAIN, 1.0), batch)
    np.testing.assert_allclose(
        np.std(np.asarray(rescaled.x0), axis=1), np.std(np.asarray(plain.x0), axis=1), rtol=1e-9
    )
    limit = (CHAIN.sigma(np.array([30.0])) / CHAIN.alpha(np.array([30.0]))).item()
    limited = run(GuidanceInterval(guidance(2.5), CHAIN, 0.0, limit), batch)
    expected = np.where(np.asarray(batch.t)[:, None] <= 30, guided.eps, plain.eps)
    np.testing.assert_allclose(limited.eps, expected, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_samples_are_distributed_as_the_mixture_or_its_class(rng, scale):
    """Kolmogorov and Smirnov's test takes 3,000 samples of the first pixel of the last class."""
    process, count, label = vp_linear(), 3000, 2
    sampler = heun(to_clean(process, log_snr_uniform(process, 60)))
    x = jnp.asarray(rng.standard_normal((count, 2)))
    keys = jax.random.split(jax.random.key(0), count)
    given = {"label": jnp.full(count, label, jnp.int32)}
    samples = jax.jit(partial(sample, sampler))(guidance(scale, process), x, keys, given)[0]
    weights = WEIGHTS if scale == 0 else np.eye(3)[label]

    def distribution(x):
        return norm.cdf(x[:, None], MEANS[:, 0], np.sqrt(VAR)) @ weights

    assert kstest(np.asarray(samples)[:, 0], distribution).pvalue > 1e-3


class TestNoisyClassifier:
    """A network of few parameters in its place."""

    @staticmethod
    def apply(params, x, dropout_keys=None, time=None):
        """Class i has the logit gain[i]·mean(x)·time."""
        return x, params["gain"][None] * (x.mean(axis=1) * time)[:, None]

    @pytest.fixture
    def classifier(self):
        parameterisation = Parameterisation(
            CHAIN, time_scale=0.1, data_std=0.5, normalise_input=True
        )
        return NoisyClassifier({"gain": jnp.array([1.0, -2.0, 0.5])}, self.apply, parameterisation)

    def expected(self, batch):
        """log p(label | x_t) by hand."""
        t = np.asarray(batch.t, int)
        alpha_bar = np.cumprod(1 - CHAIN.betas)[t]
        seen = np.asarray(batch.xt) / np.sqrt(0.25 * alpha_bar + 1 - alpha_bar)[:, None]
        odds = np.exp((seen.mean(axis=1) * 0.1 * t)[:, None] * np.array([1.0, -2.0, 0.5]))
        return np.log((odds / odds.sum(axis=1, keepdims=True))[np.arange(6), batch.given["label"]])

    def test_sees_what_the_network_was_trained_on(self, classifier, batch):
        np.testing.assert_allclose(run(classifier, batch), self.expected(batch), atol=1e-12)

    def test_takes_a_time_for_all(self, classifier, batch):
        now = batch._replace(t=jnp.full(6, 20.0))
        for_all = run(classifier, batch._replace(t=jnp.array(20.0)))
        np.testing.assert_allclose(for_all, self.expected(now), atol=1e-12)

    def test_guides(self, classifier, batch):
        """The gradient guides, here taken by finite differences."""
        model = GaussianDenoiser(0.0, 1.0, CHAIN)
        guided = run(LikelihoodGuidance(model, classifier, CHAIN, 3.0), batch)
        step = 1e-6 * np.eye(2)
        gradient = np.stack(
            [
                (self.expected(batch._replace(xt=batch.xt + d[None])) - self.expected(batch)) / 1e-6
                for d in step
            ],
            axis=1,
        )
        sigma = expand(CHAIN.sigma(batch.t), batch.xt)
        expected = run(model, batch).eps - 3 * sigma * gradient
        np.testing.assert_allclose(guided.eps, expected, atol=1e-4)
