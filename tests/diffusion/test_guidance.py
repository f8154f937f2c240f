"""Guidance of classes of Gaussians, whose every score is known in closed form.

Classifier guidance has a file of its own.
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
from jax.scipy.special import logsumexp
from scipy.integrate import solve_ivp

from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.continuous import vp_linear
from jax_ddpm.diffusion.denoiser import Denoiser
from jax_ddpm.diffusion.guidance import (
    AutoGuidance,
    ClassifierFreeGuidance,
    Guidance,
    GuidanceInterval,
    RescaledGuidance,
)
from jax_ddpm.diffusion.parameterisation import Prediction
from jax_ddpm.diffusion.process import Process, expand, q_sample
from jax_ddpm.diffusion.samplers.ancestral import ancestral
from jax_ddpm.diffusion.samplers.ddim import ddim
from jax_ddpm.diffusion.samplers.grid import log_snr_uniform, to_clean
from jax_ddpm.diffusion.samplers.scan import sample
from jax_ddpm.diffusion.schedules import make_betas
from jax_ddpm.diffusion.thresholding import ClippedDenoiser

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

    A label after the last is the null label. The fraction of the variance tells which of the two
    was asked.
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
            label = conditioning["label"]
            mask = conditioning.get("label_drop", jnp.zeros(len(xt), bool))
            mask = (mask | (label == len(self.means))).astype(xt.dtype)
            dropped = expand(mask, xt) * dropped
            mean = jnp.where(dropped == 1, mixture, expand(self.means[label], xt))
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


def by_label(model, scale, negative=None):
    """The model guided by itself without the label."""
    return ClassifierFreeGuidance(model, scale, ("label",), negative or {})


def noise_level(t):
    """σ/α."""
    t = np.array([float(t)])
    return (CHAIN.sigma(t) / CHAIN.alpha(t)).item()


KINDS = {
    "classifier_free": lambda model: by_label(model, 2.5),
    "negative": lambda model: by_label(model, 2.5, {"label": jnp.ones(1, jnp.int32)}),
    "auto": lambda model: AutoGuidance(model, ClassDenoiser(model.means + 0.1, CHAIN), 2.5),
    "rescaled": lambda model: RescaledGuidance(by_label(model, 2.5), CHAIN, 0.7),
    "interval": lambda model: GuidanceInterval(
        by_label(model, 2.5), CHAIN, noise_level(10), noise_level(60)
    ),
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


@every_kind
def test_is_a_denoiser(make, denoiser):
    guided = make(denoiser)
    assert isinstance(guided, Denoiser)
    assert guided.denoiser is denoiser if isinstance(guided, Guidance) else guided.guidance


@every_kind
def test_every_kind_leaves_xt_made_of_x0_and_eps(make, denoiser, batch):
    guided = run(make(denoiser), batch)
    assert np.any(guided.eps != run(denoiser, batch).eps)
    rebuilt = q_sample(CHAIN, guided.x0, batch.t, guided.eps)
    np.testing.assert_allclose(rebuilt, batch.xt, atol=1e-12)


@pytest.mark.parametrize("scale", SCALES)
def test_score_is_that_of_the_sharpened_class(denoiser, batch, scale):
    """∇log p(x_t)·p(c | x_t)^scale, from the densities: eqs. 3 and 6 of Ho & Salimans 2022."""

    def sharpened(x, t, label):
        unconditional = log_density(x, t)
        return unconditional + scale * (log_density(x, t, label) - unconditional)

    xt, t, given = batch
    of_pixels = jax.vmap(jax.grad(sharpened), in_axes=(0, None, None))
    score = jax.jit(jax.vmap(of_pixels))(xt, t, given["label"])
    guided = run(by_label(denoiser, scale), batch)
    np.testing.assert_allclose(guided.eps, -expand(CHAIN.sigma(t), xt) * score, atol=1e-11)


@pytest.mark.parametrize("scale", SCALES)
def test_x0_and_eps_agree_with_xt(denoiser, batch, scale):
    guided = run(by_label(denoiser, scale), batch)
    rebuilt = q_sample(CHAIN, guided.x0, batch.t, guided.eps)
    np.testing.assert_allclose(rebuilt, batch.xt, atol=1e-12)


def test_scale_0_and_1_are_the_models_themselves(denoiser, batch):
    """They agree to the last bit, in one pass of the batch as it is; scale 0 gets no label."""
    xt, t, given = batch
    for scale, conditioning in ((0.0, {}), (-0.0, {}), (1.0, given)):
        guidance, plain = by_label(denoiser, scale), Batch(xt, t, conditioning)
        assert len(calls(guidance, batch)) == 1
        assert calls(guidance, batch) == calls(denoiser, plain)
        jax.tree.map(np.testing.assert_array_equal, run(guidance, batch), run(denoiser, plain))


@pytest.mark.parametrize("t", [20.0, None], ids=["scalar", "batch"])
def test_other_scales_take_one_pass_of_twice_the_batch(denoiser, batch, t):
    xt, times, given = batch
    times = times if t is None else jnp.array(t)
    twice = {"label": (12,), "label_drop": (12,)}
    guidance = by_label(denoiser, 2.0)
    assert calls(guidance, Batch(xt, times, given)) == [
        ((12, 5), (12,) if t is None else (), twice)
    ]


def test_conditional_half_keeps_the_label_and_the_other_drops_it(denoiser, batch):
    """Scales far from 0 and 1 show it: the order of the halves matters most there."""
    conditional, unconditional = run(denoiser, batch), run(denoiser, batch._replace(given={}))
    for scale in (-1.0, 2.0):
        guided = run(by_label(denoiser, scale), batch)
        for name in ("x0", "eps"):
            c, u = getattr(conditional, name), getattr(unconditional, name)
            np.testing.assert_allclose(getattr(guided, name), (1 - scale) * u + scale * c)


def test_learned_variance_is_the_conditional_models(denoiser, batch):
    fraction = run(by_label(denoiser, 3.0), batch).variance_fraction
    np.testing.assert_array_equal(fraction, 0)


def test_without_a_learned_variance_there_is_none(batch):
    """A denoiser that is told nothing is not changed either."""
    plain = GaussianDenoiser(0.3, VAR, CHAIN)
    guided = run(by_label(plain, 3.0), batch)
    assert guided.variance_fraction is None
    np.testing.assert_allclose(guided.eps, run(plain, batch).eps, atol=1e-13)


@every_kind
@pytest.mark.parametrize("t", [5.0, 20.0])
def test_a_time_for_all_is_the_same_as_one_for_each(make, denoiser, batch, t):
    whole = run(make(denoiser), batch._replace(t=jnp.array(t)))
    each = run(make(denoiser), batch._replace(t=jnp.full(6, t)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), whole, each)


@every_kind
def test_examples_do_not_touch_each_other(make, denoiser, batch):
    """Each is the same in parts of the batch, and a change to one changes only that one."""
    guidance = make(denoiser)
    plain = run(guidance, batch)
    for part in (slice(None, None, -1), slice(2), slice(5, None)):
        alone = run(guidance, jax.tree.map(lambda x, part=part: x[part], batch))
        np.testing.assert_allclose(alone.eps, plain.eps[part], rtol=1e-12)
    changed = {"label": batch.given["label"].at[2].add(-1)}
    other = run(guidance, batch._replace(given=changed))
    differs = np.any(np.asarray(other.eps != plain.eps), axis=1)
    np.testing.assert_array_equal(differs, np.arange(6) == 2)


@pytest.fixture
def seen():
    """The conditioning of the last call of ``telling(seen)``."""
    return {}


def telling(seen):
    """A denoiser that says what it is told."""

    def denoiser(xt, t, conditioning):
        seen.clear()
        seen.update(conditioning)
        return Prediction(xt, xt)

    return denoiser


def text_of(count):
    """A conditioning that is a small tree: tokens and their mask."""
    tokens = jnp.arange(4 * count).reshape(count, 4)
    return {"tokens": tokens, "mask": tokens % 3 > 0}


def assert_same(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def test_the_names_that_guide_are_dropped_together(batch, seen):
    """Each has one mask of its own, also where it is a tree of arrays."""
    xt, t, given = batch
    text = text_of(6)
    guidance = ClassifierFreeGuidance(telling(seen), 2.0, ("label", "text"))
    guidance(xt, t, given | {"text": text})
    assert seen.keys() == {"label", "label_drop", "text", "text_drop"}
    assert_same(seen["text"], jax.tree.map(lambda x: np.concatenate([x, x]), text))
    for name in ("label_drop", "text_drop"):
        assert seen[name].dtype == bool
        np.testing.assert_array_equal(seen[name], np.arange(12) >= 6)


@pytest.mark.parametrize("scale", SCALES)
def test_what_does_not_guide_is_told_to_both(batch, seen, scale):
    """It is never dropped: the estimate of a self-conditioned network is an example."""
    xt, t, given = batch
    shared = {"x0_estimate": 2 * xt, "text": text_of(6)}
    by_label(telling(seen), scale)(xt, t, given | shared)
    if scale in (0, 1):
        assert_same(seen, shared | (given if scale == 1 else {}))
        return
    assert seen.keys() == {"label", "label_drop", "x0_estimate", "text"}
    for name, tree in shared.items():
        assert_same(seen[name], jax.tree.map(lambda x: np.concatenate([x, x]), tree))


@every_kind
def test_new_parameters_do_not_recompile(make, denoiser, batch):
    first = run(make(denoiser), batch)
    CALLS.clear()
    second = run(make(ClassDenoiser(jnp.asarray(MEANS + 0.1), CHAIN)), batch)
    assert not CALLS
    assert np.all(np.asarray(second.eps != first.eps))


class TestNegative:
    """Something else is told in place of nothing."""

    @pytest.mark.parametrize("scale", SCALES)
    def test_null_label_is_no_label(self, denoiser, batch, scale):
        null = {"label": jnp.full(6, 3, jnp.int32)}
        guided = run(by_label(denoiser, scale, null), batch)
        expected = run(by_label(denoiser, scale), batch)
        np.testing.assert_allclose(guided.eps, expected.eps, atol=1e-13)
        np.testing.assert_allclose(guided.x0, expected.x0, atol=1e-13)

    @pytest.mark.parametrize("scale", SCALES)
    def test_leads_away_from_another_class(self, denoiser, batch, scale):
        others = {"label": (batch.given["label"] + 1) % 3}
        away, towards = run(denoiser, batch._replace(given=others)), run(denoiser, batch)
        guided = run(by_label(denoiser, scale, others), batch)
        for name in ("x0", "eps"):
            n, c = getattr(away, name), getattr(towards, name)
            np.testing.assert_allclose(getattr(guided, name), (1 - scale) * n + scale * c)

    @pytest.mark.parametrize("scale", [0.0, 2.0])
    def test_one_for_all_is_one_for_each(self, denoiser, batch, scale):
        one, each = jnp.array([1], jnp.int32), jnp.ones(6, jnp.int32)
        for_all = run(by_label(denoiser, scale, {"label": one}), batch)
        for_each = run(by_label(denoiser, scale, {"label": each}), batch)
        jax.tree.map(np.testing.assert_array_equal, for_all, for_each)

    def test_what_one_half_is_not_told_is_dropped_from_it(self, batch, seen):
        negative = {"label": jnp.full(6, 2, jnp.int32), "text": text_of(1)}
        names = ("label", "text", "size")
        xt, t, given = batch
        guidance = ClassifierFreeGuidance(telling(seen), 2.0, names, negative)
        guidance(xt, t, given | {"size": jnp.zeros(6)})
        first = np.arange(12) < 6
        np.testing.assert_array_equal(seen["label"], np.append(given["label"], [2] * 6))
        assert not seen["label_drop"].any()
        assert_same(seen["text"], jax.tree.map(lambda x: np.repeat(x, 12, axis=0), text_of(1)))
        np.testing.assert_array_equal(seen["text_drop"], first)
        np.testing.assert_array_equal(seen["size_drop"], ~first)


class TestAutoGuidance:
    """Guidance by a worse model."""

    @pytest.fixture
    def worse(self):
        return ClassDenoiser(jnp.asarray(0.5 * MEANS), CHAIN)

    @pytest.mark.parametrize("scale", SCALES)
    def test_by_itself_changes_nothing(self, denoiser, batch, scale):
        guided = run(AutoGuidance(denoiser, denoiser, scale), batch)
        jax.tree.map(np.testing.assert_array_equal, guided, run(denoiser, batch))

    @pytest.mark.parametrize("scale", SCALES)
    def test_by_the_unconditional_model_is_classifier_free_guidance(self, denoiser, batch, scale):
        unconditional = by_label(denoiser, 0.0)
        guided = run(AutoGuidance(denoiser, unconditional, scale), batch)
        expected = run(by_label(denoiser, scale), batch)
        np.testing.assert_allclose(guided.eps, expected.eps, atol=1e-13)
        np.testing.assert_allclose(guided.x0, expected.x0, atol=1e-13)

    def test_scale_0_and_1_are_the_models_themselves(self, denoiser, worse, batch):
        for scale, alone in ((0.0, worse), (1.0, denoiser)):
            guidance = AutoGuidance(denoiser, worse, scale)
            assert len(calls(guidance, batch)) == 1
            jax.tree.map(np.testing.assert_array_equal, run(guidance, batch), run(alone, batch))

    def test_leads_away_from_the_worse_model(self, denoiser, worse, batch):
        model, guide = run(denoiser, batch), run(worse, batch)
        guided = run(AutoGuidance(denoiser, worse, 3.0), batch)
        np.testing.assert_allclose(guided.x0, guide.x0 + 3 * (model.x0 - guide.x0), atol=1e-12)
        np.testing.assert_allclose(guided.eps, guide.eps + 3 * (model.eps - guide.eps), atol=1e-12)


class TestRescaled:
    """Guidance rescaled to the contrast of the conditional model."""

    @pytest.fixture
    def images(self, batch, rng):
        """Images of 4×3 pixels and two channels."""
        return batch._replace(xt=jnp.asarray(rng.standard_normal((6, 4, 3, 2))))

    @pytest.fixture
    def guidance(self, denoiser):
        return by_label(denoiser, 4.0)

    @staticmethod
    def std(prediction):
        """The deviation of each example."""
        return np.std(np.asarray(prediction.x0).reshape(6, -1), axis=1)

    def test_phi_1_restores_the_conditional_models_standard_deviation(
        self, denoiser, guidance, images
    ):
        conditional, guided = run(denoiser, images), run(guidance, images)
        rescaled = run(RescaledGuidance(guidance, CHAIN, 1.0), images)
        assert np.all(np.abs(self.std(guided) / self.std(conditional) - 1) > 1e-3)
        np.testing.assert_allclose(self.std(rescaled), self.std(conditional), rtol=1e-12)

    def test_flat_images_stay_as_they_are(self, images):
        """A guided x_0 without any deviation has none to restore."""

        @jax.tree_util.register_static
        class Flat:
            def guided_and_plain(self, xt, t, conditioning):
                flat = Prediction(jnp.full_like(xt, 0.5), jnp.zeros_like(xt))
                return flat, flat

        rescaled = run(RescaledGuidance(Flat(), CHAIN, 0.7), images)
        np.testing.assert_allclose(rescaled.x0, 0.5)
        assert np.all(np.isfinite(rescaled.eps))

    def test_phi_0_changes_nothing(self, guidance, images):
        rescaled = run(RescaledGuidance(guidance, CHAIN, 0.0), images)
        jax.tree.map(np.testing.assert_array_equal, rescaled, run(guidance, images))

    @pytest.mark.parametrize("phi", [0.3, 0.7])
    def test_phi_leads_from_the_guided_x0_to_the_rescaled_one(self, guidance, images, phi):
        none, some, all_ = (
            run(RescaledGuidance(guidance, CHAIN, share), images).x0 for share in (0.0, phi, 1.0)
        )
        np.testing.assert_allclose(some, (1 - phi) * none + phi * all_, atol=1e-12)

    def test_scale_1_has_nothing_to_restore(self, denoiser, images):
        guidance = RescaledGuidance(by_label(denoiser, 1.0), CHAIN, 0.7)
        assert len(calls(guidance, images)) == 1
        np.testing.assert_allclose(run(guidance, images).x0, run(denoiser, images).x0, rtol=1e-14)

    def test_costs_no_pass(self, guidance, images):
        rescaled = RescaledGuidance(guidance, CHAIN, 0.7)
        assert calls(rescaled, images) == calls(guidance, images)

    @pytest.mark.parametrize("phi", [-0.1, 1.1])
    def test_refuses_more_than_all(self, guidance, phi):
        with pytest.raises(ValueError, match="phi"):
            RescaledGuidance(guidance, CHAIN, phi)


class TestInterval:
    """The interval from after t = 20 up to t = 50."""

    @pytest.fixture
    def interval(self, denoiser):
        guidance = by_label(denoiser, 4.0)
        return GuidanceInterval(guidance, CHAIN, noise_level(20), noise_level(50))

    @pytest.mark.parametrize(("t", "guided"), [(20, False), (21, True), (50, True), (51, False)])
    def test_is_guided_inside_and_the_conditional_model_outside(
        self, denoiser, interval, batch, t, guided
    ):
        expected = interval.guidance if guided else denoiser
        now = batch._replace(t=jnp.array(float(t)))
        jax.tree.map(np.testing.assert_array_equal, run(interval, now), run(expected, now))

    def test_each_example_has_its_own_time(self, denoiser, interval, batch):
        now = batch._replace(t=jnp.array([20.0, 21, 50, 51, 0, 99]))
        is_guided = np.array([False, True, True, False, False, False])[:, None]
        guided, plain = run(interval.guidance, now), run(denoiser, now)
        expected = np.where(is_guided, guided.eps, plain.eps)
        np.testing.assert_array_equal(run(interval, now).eps, expected)

    def test_steps_outside_cost_one_pass(self, interval, batch):
        """Counted as they run: 30 of 100 steps are guided, at twice the batch."""
        sizes = []

        @jax.tree_util.register_dataclass
        @dataclasses.dataclass(frozen=True)
        class Counted:
            denoiser: ClassDenoiser

            def __call__(self, xt, t, conditioning):
                jax.debug.callback(lambda: sizes.append(len(xt)))
                return self.denoiser(xt, t, conditioning)

        guidance = by_label(Counted(interval.guidance.denoiser), 4.0)
        counted = dataclasses.replace(interval, guidance=guidance)
        sampler = ddim(to_clean(CHAIN, np.arange(99.0, -1, -1)))
        keys = jax.random.split(jax.random.key(0), 6)
        jax.jit(partial(sample, sampler))(counted, batch.xt, keys, batch.given)
        jax.effects_barrier()
        assert (sizes.count(6), sizes.count(12)) == (70, 30)

    @pytest.mark.parametrize(("high", "guided"), [(1e9, False), (np.inf, True)])
    def test_pure_noise_lies_at_infinity(self, denoiser, batch, high, guided):
        chain = Chain(np.append(CHAIN.betas[:-1], 1.0))
        model = ClassDenoiser(denoiser.means, chain)
        guidance = by_label(model, 4.0)
        now = batch._replace(t=jnp.array(99.0))
        result = run(GuidanceInterval(guidance, chain, 0.0, high), now)
        expected = run(guidance if guided else model, now)
        np.testing.assert_array_equal(result.x0, expected.x0)

    @pytest.mark.parametrize("ends", [(1.0, 1.0), (2.0, 1.0), (-1.0, 1.0)])
    def test_refuses_what_is_no_interval(self, interval, ends):
        with pytest.raises(ValueError, match="interval"):
            GuidanceInterval(interval.guidance, CHAIN, *ends)


def test_clips_what_is_guided(denoiser, batch):
    """The guided x_0, not the two that it is made of; ε follows."""
    guidance = by_label(denoiser, 7.5)
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
    sampler = ancestral(to_clean(CHAIN, times), "fixedsmall")
    guidance = by_label(WideDenoiser(wide, CHAIN), scale)
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


@pytest.mark.parametrize("scale", [0.5, 2.0, 3.0])
def test_samples_have_the_variance_of_the_ode(scale):
    """N(0, 1) guided from N(0, 2), where the density p(x)·p(c | x)^scale is another one.

    dx/dt = -β/2·(x + score) (Song et al. 2021, eq. 13) is linear, so that one run tells the factor.
    """

    def slope(t, x):
        alpha_bar = np.exp(-(0.1 * t + 19.9 * t**2 / 2))
        wide, narrow = -x / (2 * alpha_bar + 1 - alpha_bar), -x
        return -(0.1 + 19.9 * t) / 2 * (x + wide + scale * (narrow - wide))

    factor = solve_ivp(slope, (1, 0), [1.0], rtol=1e-9, atol=1e-12).y[0, -1]
    process = vp_linear()
    guidance = AutoGuidance(
        GaussianDenoiser(0.0, 1.0, process), GaussianDenoiser(0.0, 2.0, process), scale
    )
    sampler = ddim(to_clean(process, log_snr_uniform(process, 4000)))
    keys = jax.random.split(jax.random.key(0), 2)
    x = jnp.array([[1.0], [-0.3]])
    samples = np.asarray(jax.jit(partial(sample, sampler))(guidance, x, keys, {})[0])
    np.testing.assert_allclose(samples, factor * x, rtol=2e-3)
    tilted = 1 / (0.5 + scale * (1 - 0.5))
    assert abs(factor**2 / tilted - 1) > 0.05
