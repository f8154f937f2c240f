"""Sample quality: each metric over the features of samples and of real images."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jax_ddpm.errors import UserError
from jax_ddpm.evaluation.agreement import agreement
from jax_ddpm.evaluation.estimate import proportion
from jax_ddpm.evaluation.features import Extractor, FeatureSet
from jax_ddpm.evaluation.finite import finite
from jax_ddpm.evaluation.frechet import frechet_distance, require_covariance
from jax_ddpm.evaluation.inception_score import inception_score
from jax_ddpm.evaluation.kernel import kernel_distance
from jax_ddpm.evaluation.manifold import precision_recall_density_coverage
from jax_ddpm.evaluation.memorisation import memorisation
from jax_ddpm.evaluation.reference import Reference

SPLITS, NEIGHBOURS = 10, 5
Result = dict[str, Any]  # "value", and its details


class Protocol(NamedTuple):
    """The reference of a measurement, and its network.

    ``reference`` is None where no metric needs one. ``heldout``, real images that training did not
    see, is None where memorisation is not asked for or they are not known.
    """

    extractor: Extractor
    reference: Reference | None
    heldout: FeatureSet | None

    def real(self) -> FeatureSet:
        """The reference's own images, which ``check_possible`` has found to be known."""
        assert self.reference is not None
        assert self.reference.real is not None
        return self.reference.real


def check_possible(
    metrics: list[str], protocol: Protocol, num_images: int, has_labels: bool
) -> None:
    """Checks that so many images can be measured in this way, before they are sampled.

    Raises:
      UserError: where a metric lacks what it needs.
    """
    reference = protocol.reference
    if "fid" in metrics:
        assert reference is not None
        width, count = reference.moments.mean.size, reference.moments.count
        require_covariance(num_images, width)
        if count is not None and count <= width:
            raise UserError(
                f"the reference's {count:,} images are too few for a covariance of {width:,} "
                "features; give more, or --metrics=kid"
            )
    for name in metrics:
        if num_images < METRICS[name].least:
            raise UserError(
                f"--metrics={name} takes {METRICS[name].least} samples or more; there are "
                f"{num_images}"
            )
        if METRICS[name].needs_images and (reference is None or reference.real is None):
            raise UserError(
                f"--metrics={name} compares with images, but --reference holds moments, which "
                "serve fid alone; give train, heldout, or a folder of images"
            )
    if "memorisation" in metrics and protocol.heldout is None:
        raise UserError(
            "--metrics=memorisation compares with a run's training and held-out images: give "
            "--reference=train, and --workdir or --config"
        )
    if "agreement" in metrics and not (protocol.extractor.name == "classifier" and has_labels):
        raise UserError(
            "--metrics=agreement takes samples of a class-conditional model, and --extractor=the "
            "folder of a classifier's run"
        )


def _fid(samples: FeatureSet, protocol: Protocol) -> dict[str, Result]:
    assert protocol.reference is not None
    distance = frechet_distance(samples.moments(), protocol.reference.moments)
    return {_named("fid", "fd", protocol): {"value": distance}}


def _kid(samples: FeatureSet, protocol: Protocol) -> dict[str, Result]:
    fake, real = samples.everything().features, protocol.real().everything().features
    return {_named("kid", "kd", protocol): kernel_distance(fake, real)._asdict()}


def _inception_score(samples: FeatureSet, protocol: Protocol) -> dict[str, Result]:
    score = inception_score(samples.everything().logits, SPLITS)
    name = _named("is", "is", protocol)
    return {name: {"value": score.value, "std_over_splits": score.std}}


def _prdc(samples: FeatureSet, protocol: Protocol) -> dict[str, Result]:
    fake, real = samples.everything().features, protocol.real().everything().features
    manifold = precision_recall_density_coverage(real, fake, NEIGHBOURS)
    return {name: {"value": value} for name, value in manifold._asdict().items()}


def _memorisation(samples: FeatureSet, protocol: Protocol) -> dict[str, Result]:
    assert protocol.heldout is not None
    spaces: dict[str, Callable[[FeatureSet], np.ndarray]] = {
        "features": lambda images: images.everything().features,
        "pixels": lambda images: images.pixels(),
    }
    results = {}
    for space, points in spaces.items():
        copying = memorisation(points(samples), points(protocol.real()), points(protocol.heldout))
        results[f"closer_than_heldout/{space}"] = {
            **copying.closer_share._asdict(),
            "closest_percent_share": copying.closest_percent_share._asdict(),
            "median_distance": copying.sample_median,
            "median_distance_heldout": copying.heldout_median,
        }
    return results


def _agreement(samples: FeatureSet, protocol: Protocol) -> dict[str, Result]:
    logits, labels = finite(samples.everything().logits, "logits"), samples.images.labels
    assert labels is not None
    found = agreement(labels[: len(logits)], logits.argmax(axis=1), logits.shape[1])
    per_class = {str(label): share.value for label, share in found.per_class.items()}
    details = {
        "class_names": list(protocol.extractor.class_names),
        "per_class": per_class,
        "confusion": found.confusion.tolist(),
    }
    return {"agreement": found.overall._asdict() | details}


class Metric(NamedTuple):
    """``measure``: samples → results by name; ``settings``: what else decides them; ``least``: the
    smallest number of samples."""

    measure: Callable[[FeatureSet, Protocol], dict[str, Result]]
    settings: dict[str, Any]
    needs_reference: bool = True
    needs_images: bool = False
    least: int = 1


METRICS = {
    "fid": Metric(_fid, {}),
    "kid": Metric(_kid, {"kernel": "(x·y/d + 1)³ over all pairs"}, needs_images=True, least=3),
    "is": Metric(_inception_score, {"splits": SPLITS}, needs_reference=False, least=SPLITS),
    "prdc": Metric(_prdc, {"neighbours": NEIGHBOURS}, needs_images=True, least=NEIGHBOURS + 1),
    "memorisation": Metric(_memorisation, {}, needs_images=True, least=2),
    "agreement": Metric(_agreement, {}, needs_reference=False),
}


def combine(per_seed: list[Result]) -> Result:
    """One result of several seeds: mean and standard deviation of the values.

    Shares of trials are pooled, and their interval with them.
    """
    if len(per_seed) == 1:
        return per_seed[0]
    values = [result["value"] for result in per_seed]
    combined = {"value": float(np.mean(values)), "std": float(np.std(values, ddof=1))}
    if "low" in per_seed[0]:
        trials = sum(result["count"] for result in per_seed)
        hits = sum(round(result["value"] * result["count"]) for result in per_seed)
        combined |= proportion(hits, trials)._asdict()
    return combined | {"per_seed": per_seed}


def _named(inception_name: str, other_name: str, protocol: Protocol) -> str:
    """A metric bears the name it was defined with only over Inception's features."""
    extractor = protocol.extractor.name
    return inception_name if extractor == "inception" else f"{other_name}/{extractor}"
