"""Metrics by name: what each is called, takes and refuses, and results over seeds."""

import dataclasses

import numpy as np
import pytest

from jax_ddpm.errors import UserError
from jax_ddpm.evaluation.estimate import proportion
from jax_ddpm.evaluation.features import Extractor, Features, FeatureSet
from jax_ddpm.evaluation.frechet import frechet_distance, moments
from jax_ddpm.evaluation.image_sets import ImageSet
from jax_ddpm.evaluation.inception_score import inception_score
from jax_ddpm.evaluation.kernel import kernel_distance
from jax_ddpm.evaluation.manifold import precision_recall_density_coverage
from jax_ddpm.evaluation.memorisation import memorisation
from jax_ddpm.evaluation.metrics import METRICS, Protocol, check_possible, combine
from jax_ddpm.evaluation.reference import Reference, reference_of

WIDTH, CLASSES = 4, 3


def features_of(seed, count, labels=None, shift=0.0) -> FeatureSet:
    """Random images with random features, in batches of 7."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 2, 3, 1), dtype=np.uint8)
    features = rng.standard_normal((count, WIDTH)).astype(np.float32) + np.float32(shift)
    logits = rng.standard_normal((count, CLASSES)).astype(np.float32)
    images = ImageSet({"seed": seed}, count, pixels.__getitem__, labels)

    def batches():
        for start in range(0, count, 7):
            rows = slice(start, start + 7)
            yield Features(features[rows], logits[rows])

    return FeatureSet(images, count, batches)


def protocol(name="inception", **changes) -> Protocol:
    extractor = Extractor(name, print, None, {"name": name})
    usual = Protocol(extractor, reference_of(features_of(0, 50)), features_of(1, 30))
    return usual._replace(**changes)


LABELS = np.arange(40) % CLASSES
SAMPLES = features_of(2, 40, LABELS, shift=0.3)
FAKE, LOGITS = SAMPLES.everything()
REAL, HELDOUT = (
    features_of(seed, count).everything().features for seed, count in ((0, 50), (1, 30))
)


def value(metric, name, **changes):
    return METRICS[metric].measure(SAMPLES, protocol(**changes))[name]["value"]


class TestAreComputedFromTheFeatures:
    """Each equals its function, called here on the arrays."""

    def test_fid(self):
        expected = frechet_distance(moments(FAKE), moments(REAL))
        assert value("fid", "fid") == pytest.approx(expected, rel=1e-10)

    def test_kid(self):
        found = METRICS["kid"].measure(SAMPLES, protocol())["kid"]
        expected = kernel_distance(FAKE, REAL)
        assert found == {"value": expected.value, "standard_error": expected.standard_error}

    def test_is(self):
        found = METRICS["is"].measure(SAMPLES, protocol())["is"]
        expected = inception_score(LOGITS, 10)
        assert found == {"value": expected.value, "std_over_splits": expected.std}

    def test_prdc(self):
        found = METRICS["prdc"].measure(SAMPLES, protocol())
        expected = precision_recall_density_coverage(REAL, FAKE, 5)
        assert {name: result["value"] for name, result in found.items()} == expected._asdict()

    def test_memorisation(self):
        found = METRICS["memorisation"].measure(SAMPLES, protocol())
        sets = [SAMPLES, features_of(0, 50), features_of(1, 30)]
        for space, points in {
            "features": [FAKE, REAL, HELDOUT],
            "pixels": [images.pixels() for images in sets],
        }.items():
            expected = memorisation(*points)
            result = found[f"closer_than_heldout/{space}"]
            assert result["value"] == expected.closer_share.value
            assert result["standard_error"] == expected.closer_share.standard_error
            assert result["closest_percent_share"] == expected.closest_percent_share._asdict()
            assert result["median_distance"] == expected.sample_median
            assert result["median_distance_heldout"] == expected.heldout_median

    def test_agreement(self):
        named = protocol("classifier")
        extractor = named.extractor._replace(class_names=("cat", "dog", "owl"))
        named = named._replace(extractor=extractor)
        found = METRICS["agreement"].measure(SAMPLES, named)["agreement"]
        assert found["class_names"] == ["cat", "dog", "owl"]
        right = LOGITS.argmax(axis=1) == LABELS
        assert found["value"] == right.mean()
        assert found["count"] == 40
        per_class = {str(label): right[label == LABELS].mean() for label in range(CLASSES)}
        assert found["per_class"] == pytest.approx(per_class)
        assert np.sum(found["confusion"]) == 40
        np.testing.assert_allclose(np.trace(found["confusion"]), right.sum())


@pytest.mark.parametrize("extractor", ["inception", "efficientnet_lite0", "classifier"])
def test_only_inceptions_bear_the_known_names(extractor):
    names = {
        name
        for metric in ("fid", "kid", "is")
        for name in METRICS[metric].measure(SAMPLES, protocol(extractor))
    }
    known = {"fid", "kid", "is"}
    assert names == (
        known if extractor == "inception" else {f"{n}/{extractor}" for n in ("fd", "kd", "is")}
    )


def test_agreement_by_logits_that_are_not_finite_is_refused():
    """Of NaN, the first class is the largest."""
    *others, last = SAMPLES.batches()
    broken = [*others, last._replace(logits=np.full_like(last.logits, np.nan))]
    samples = dataclasses.replace(SAMPLES, batches=lambda: iter(broken))
    with pytest.raises(UserError, match="values of the logits are not finite"):
        METRICS["agreement"].measure(samples, protocol("classifier"))


class TestCheckPossible:
    @staticmethod
    def refuses(metrics, given=None, num_images=40, has_labels=True):
        with pytest.raises(UserError) as caught:
            check_possible(metrics, given or protocol(), num_images, has_labels)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    MOMENTS = Reference({}, moments(REAL), None)

    def test_lets_pass_what_can_be_measured(self):
        usual = ["fid", "kid", "is", "prdc", "memorisation"]
        check_possible(usual, protocol(), 40, False)
        check_possible([*usual, "agreement"], protocol("classifier"), 40, True)
        check_possible(["fid", "is"], protocol(reference=self.MOMENTS, heldout=None), 40, False)
        check_possible(["is"], protocol(reference=None, heldout=None), 40, False)

    @pytest.mark.parametrize("number", [1, WIDTH - 1, WIDTH])
    def test_too_few_samples_for_a_covariance(self, number):
        assert "too few for a covariance" in self.refuses(["fid"], num_images=number)

    def test_too_few_real_images_for_a_covariance(self):
        """Refused before anything is sampled, too."""
        given = protocol(reference=reference_of(features_of(0, WIDTH)))
        assert "reference" in self.refuses(["fid"], given)

    @pytest.mark.parametrize(("metric", "number"), [("kid", 2), ("is", 9), ("prdc", 5)])
    def test_too_few_samples_for_others(self, metric, number):
        """This is known before they are sampled."""
        assert str(number) in self.refuses([metric], num_images=number)

    @pytest.mark.parametrize("metric", ["kid", "prdc", "memorisation"])
    def test_moments_where_images_are_needed(self, metric):
        line = self.refuses(["fid", metric], protocol(reference=self.MOMENTS))
        assert f"--metrics={metric}" in line
        assert "--reference" in line

    def test_memorisation_without_heldout_images(self):
        assert "--metrics=memorisation" in self.refuses(["memorisation"], protocol(heldout=None))

    @pytest.mark.parametrize(("extractor", "labels"), [("classifier", False), ("inception", True)])
    def test_agreement_without_classes(self, extractor, labels):
        line = self.refuses(["agreement"], protocol(extractor), has_labels=labels)
        assert "--metrics=agreement" in line


class TestCombine:
    def test_one_seed_is_itself(self):
        result = {"value": 3.0, "standard_error": 0.1}
        assert combine([result]) == result

    def test_mean_and_deviation_over_seeds(self):
        results = [{"value": v, "standard_error": 0.1} for v in (3.0, 4.0, 8.0)]
        found = combine(results)
        assert found["value"] == 5.0
        assert found["std"] == pytest.approx(7**0.5)
        assert found["per_seed"] == results
        assert "standard_error" not in found

    def test_shares_are_pooled(self):
        shares = [proportion(k, 30)._asdict() | {"per_class": {}} for k in (7, 0, 30)]
        found = combine(shares)
        pooled = proportion(37, 90)
        assert found["value"] == pytest.approx(pooled.value)
        assert (found["low"], found["high"], found["count"]) == (pooled.low, pooled.high, 90)
        assert found["per_seed"] == shares
