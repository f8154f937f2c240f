"""Guidance of classes of Gaussians, whose every score is known in closed form."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from exact import GaussianDenoiser
from jax.scipy.special import logsumexp

from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.denoiser import ClippedDenoiser, Denoiser
from jax_ddpm.diffusion.guidance import ClassifierFreeGuidance
from jax_ddpm.diffusion.parameterisation import Prediction
from jax_ddpm.diffusion.process import Process, expand, q_sample
from jax_ddpm.diffusion.samplers.ancestral import ancestral
from jax_ddpm.diffusion.samplers.loop import sample
from jax_ddpm.diffusion.schedules import make_betas

pytestmark = pytest.mark.usefixtures("x64")
quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

CHAIN = Chain(make_betas("linear", 100))
MEANS, VAR = np.array([-0.6, 0.1, 0.9]), 0.04
SCALES = [0.0, 0.3, 1.0, 1.5, 7.5]
CALLS = []


def log_density(x, t, label=None):
    """log q(x_t | label) of one scalar up to a constant; of the even mixture without a label."""
    alpha, sigma = CHAIN.alpha(t), CHAIN.sigma(t)
    variance = alpha**2 * VAR + sigma**2
    means = alpha * jnp.asarray(MEANS)
    of_class = -((x - means) ** 2) / (2 * variance)
    return logsumexp(of_class) if label is None else of_class[label]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassDenoiser:
    """The exact denoiser of x_0 ~ N(means[label], var), and without a label of their mixture.

    The fraction of the variance tells which of the two was asked.
    """

    means: jax.Array
    process: Process = dataclasses.field(metadata={"static": True})

    def __call__(self, xt, t, conditioning):
        CALLS.append((xt.shape, t.shape, {name: v.shape for name, v in conditioning.items()}))
        alpha, sigma = expand(self.process.alpha(t), xt), expand(self.process.sigma(t), xt)
        variance = alpha**2 * VAR + sigma**2
        means = self.means.reshape(*xt.ndim * [1], -1)
        log_p = -((xt[..., None] - alpha[..., None] * means) ** 2) / (2 * variance[..., None])
        mixture = jnp.sum(jax.nn.softmax(log_p) * means, axis=-1)
        mean, dropped = mixture, jnp.ones_like(xt)
        if "label" in conditioning:
            mask = conditioning.get("label_drop", jnp.zeros(len(xt), bool))
            dropped = expand(mask.astype(xt.dtype), xt) * dropped
            mean = jnp.where(dropped == 1, mixture, expand(self.means[conditioning["label"]], xt))
        whitened = (xt - alpha * mean) / variance
        x0, eps = mean + alpha * VAR * whitened, sigma * whitened
        return Prediction(x0, eps, dropped)


@jax.jit
def run(denoiser, batch):
    return denoiser(*batch)


def calls(denoiser, batch):
    """The shapes of every call that this leads to."""
    CALLS.clear()
    jax.eval_shape(lambda *arguments: denoiser(*arguments), *batch)
    return list(CALLS)


@pytest.fixture
def denoiser():
    return ClassDenoiser(jnp.asarray(MEANS), CHAIN)


class Batch(NamedTuple):
    xt: jax.Array
    t: jax.Array
    given: dict


@pytest.fixture
def batch(rng):
    """Noisy states at times of their own, one of them whole at either end of the chain."""
    t = jnp.array([0.0, 99, 3, 50, 20, 80])
    label = np.arange(6) % 3
    x0 = MEANS[label, None] + np.sqrt(VAR) * rng.standard_normal((6, 5))
    xt = q_sample(CHAIN, jnp.asarray(x0), t, jnp.asarray(rng.standard_normal((6, 5))))
    return Batch(xt, t, {"label": jnp.asarray(label, jnp.int32)})


def test_is_a_denoiser(denoiser):
    assert isinstance(ClassifierFreeGuidance(denoiser, 2.0), Denoiser)


@pytest.mark.parametrize("scale", SCALES)
def test_score_is_that_of_the_sharpened_class(denoiser, batch, scale):
    """∇log p(x_t)·p(c | x_t)^scale, from the densities: eqs. 3 and 6 of Ho & Salimans 2022."""

    def sharpened(x, t, label):
        unconditional = log_density(x, t)
        return unconditional + scale * (log_density(x, t, label) - unconditional)

    xt, t, given = batch
    of_pixels = jax.vmap(jax.grad(sharpened), in_axes=(0, None, None))
    score = jax.jit(jax.vmap(of_pixels))(xt, t, given["label"])
    guided = run(ClassifierFreeGuidance(denoiser, scale), batch)
    np.testing.assert_allclose(guided.eps, -expand(CHAIN.sigma(t), xt) * score, atol=1e-11)


@pytest.mark.parametrize("scale", SCALES)
def test_x0_and_eps_agree_with_xt(denoiser, batch, scale):
    guided = run(ClassifierFreeGuidance(denoiser, scale), batch)
    rebuilt = q_sample(CHAIN, guided.x0, batch.t, guided.eps)
    np.testing.assert_allclose(rebuilt, batch.xt, atol=1e-12)


def test_scale_0_and_1_are_the_models_themselves(denoiser, batch):
    """To the last bit, in one pass of the batch as it is; the first is told no label at all."""
    xt, t, given = batch
    for scale, conditioning in ((0.0, {}), (-0.0, {}), (1.0, given)):
        guidance, plain = ClassifierFreeGuidance(denoiser, scale), Batch(xt, t, conditioning)
        assert len(calls(guidance, batch)) == 1
        assert calls(guidance, batch) == calls(denoiser, plain)
        jax.tree.map(np.testing.assert_array_equal, run(guidance, batch), run(denoiser, plain))


@pytest.mark.parametrize("t", [20.0, None], ids=["scalar", "batch"])
def test_other_scales_take_one_pass_of_twice_the_batch(denoiser, batch, t):
    xt, times, given = batch
    times = times if t is None else jnp.array(t)
    twice = {"label": (12,), "label_drop": (12,)}
    guidance = ClassifierFreeGuidance(denoiser, 2.0)
    assert calls(guidance, Batch(xt, times, given)) == [
        ((12, 5), (12,) if t is None else (), twice)
    ]


def test_conditional_half_keeps_the_label_and_the_other_drops_it(denoiser, batch):
    """Seen where the two halves differ most: far from 0 and 1 the order of them matters."""
    conditional, unconditional = run(denoiser, batch), run(denoiser, batch._replace(given={}))
    for scale in (-1.0, 2.0):
        guided = run(ClassifierFreeGuidance(denoiser, scale), batch)
        for name in ("x0", "eps"):
            c, u = getattr(conditional, name), getattr(unconditional, name)
            np.testing.assert_allclose(getattr(guided, name), (1 - scale) * u + scale * c)


def test_learned_variance_is_the_conditional_models(denoiser, batch):
    fraction = run(ClassifierFreeGuidance(denoiser, 3.0), batch).variance_fraction
    np.testing.assert_array_equal(fraction, 0)


def test_without_a_learned_variance_there_is_none(batch):
    """And a denoiser that is told nothing is not changed."""
    plain = GaussianDenoiser(0.3, VAR, CHAIN)
    guided = run(ClassifierFreeGuidance(plain, 3.0), batch)
    assert guided.variance_fraction is None
    np.testing.assert_allclose(guided.eps, run(plain, batch).eps, atol=1e-13)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_a_time_for_all_is_the_same_as_one_for_each(denoiser, batch, scale):
    guidance = ClassifierFreeGuidance(denoiser, scale)
    whole = run(guidance, batch._replace(t=jnp.array(20.0)))
    each = run(guidance, batch._replace(t=jnp.full(6, 20.0)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), whole, each)


def test_examples_do_not_touch_each_other(denoiser, batch):
    """In reverse order each is what it was, and a change to one changes it alone."""
    guidance = ClassifierFreeGuidance(denoiser, 2.5)
    plain = run(guidance, batch)
    back = run(guidance, jax.tree.map(lambda x: x[::-1], batch))
    np.testing.assert_allclose(back.eps[::-1], plain.eps, rtol=1e-12)
    changed = {"label": batch.given["label"].at[2].add(-1)}
    other = run(guidance, batch._replace(given=changed))
    differs = np.any(np.asarray(other.eps != plain.eps), axis=1)
    np.testing.assert_array_equal(differs, np.arange(6) == 2)


def test_every_conditioning_is_dropped_together(batch):
    """Each array has a mask of its own."""
    seen = {}

    def denoiser(xt, t, conditioning):
        seen.update(conditioning)
        return Prediction(xt, xt)

    xt, t, given = batch
    text = jnp.arange(24.0).reshape(6, 4)
    ClassifierFreeGuidance(denoiser, 2.0)(xt, t, given | {"text": text})
    assert seen.keys() == {"label", "label_drop", "text", "text_drop"}
    np.testing.assert_array_equal(seen["text"], np.concatenate([text, text]))
    for name in ("label_drop", "text_drop"):
        assert seen[name].dtype == bool
        np.testing.assert_array_equal(seen[name], np.arange(12) >= 6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_new_parameters_do_not_recompile(denoiser, batch, scale):
    first = run(ClassifierFreeGuidance(denoiser, scale), batch)
    CALLS.clear()
    other = ClassDenoiser(jnp.asarray(MEANS + 0.1), CHAIN)
    second = run(ClassifierFreeGuidance(other, scale), batch)
    assert not CALLS
    assert np.all(np.asarray(second.eps != first.eps))


def test_clips_what_is_guided(denoiser, batch):
    """The guided x_0, not the two that it is made of; ε follows."""
    guidance = ClassifierFreeGuidance(denoiser, 7.5)
    raw, clipped = run(guidance, batch), run(ClippedDenoiser(guidance, CHAIN), batch)
    assert np.any(np.abs(raw.x0) > 1)
    np.testing.assert_array_equal(clipped.x0, np.clip(raw.x0, -1, 1))
    rebuilt = q_sample(CHAIN, clipped.x0, batch.t, clipped.eps)
    np.testing.assert_allclose(rebuilt, batch.xt, atol=1e-12)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WideDenoiser:
    """Classes of N(mean, var) among everything, N(0, wide): guided, it is affine in x_t."""

    wide: float
    process: Process = dataclasses.field(metadata={"static": True})

    def __call__(self, xt, t, conditioning):
        mean = jnp.asarray(MEANS)[conditioning["label"]][:, None]
        of_class = GaussianDenoiser(mean, VAR, self.process)(xt, t, {})
        of_all = GaussianDenoiser(0.0, self.wide, self.process)(xt, t, {})
        dropped = conditioning.get("label_drop", jnp.zeros(len(xt), bool))[:, None]
        return jax.tree.map(partial(jnp.where, dropped), of_all, of_class)


@pytest.mark.parametrize(("scale", "stride"), [(1.0, 1), (2.0, 7), (4.0, 1)])
def test_guided_samples_have_the_moments_of_the_recursion(rng, scale, stride):
    """x_s = c_0·(u + scale·(c - u)) + c_t·x_t + √β̃·z with both posterior means of Gaussians."""
    wide, label, count = 1.0, 2, 20_000
    times = np.arange(99, -1, -stride, dtype=float)
    sampler = ancestral(CHAIN, times, "fixedsmall")
    guidance = ClassifierFreeGuidance(WideDenoiser(wide, CHAIN), scale)
    x = jnp.asarray(rng.standard_normal((count, 1)))
    keys = jax.random.split(jax.random.key(0), count)
    given = {"label": jnp.full(count, label)}
    samples = np.asarray(jax.jit(partial(sample, sampler))(guidance, x, keys, given)[0])

    alpha_bar = np.cumprod(1 - CHAIN.betas)[times.astype(int)]
    mean, var = 0.0, 1.0
    for now, after in zip(alpha_bar, np.append(alpha_bar[1:], 1), strict=True):
        beta = 1 - now / after
        unconditional = np.sqrt(now) * wide / (now * wide + 1 - now)
        conditional = np.sqrt(now) * VAR / (now * VAR + 1 - now)
        gain = unconditional + scale * (conditional - unconditional)
        constant = scale * MEANS[label] * (1 - conditional * np.sqrt(now))
        coef_x0, coef_xt = (
            np.sqrt(after) * beta / (1 - now),
            np.sqrt(now / after) * (1 - after) / (1 - now),
        )
        slope = coef_x0 * gain + coef_xt
        mean = slope * mean + coef_x0 * constant
        var = slope**2 * var + beta * (1 - after) / (1 - now)
    np.testing.assert_allclose(samples.mean(), mean, atol=5 * np.sqrt(var / count))
    np.testing.assert_allclose(samples.var(), var, rtol=5 * np.sqrt(2 / count))
