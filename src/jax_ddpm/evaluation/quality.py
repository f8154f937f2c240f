"""Measuring sets of samples against real images, all in one way."""

import dataclasses
import pathlib
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import numpy as np

from jax_ddpm import images as pictures
from jax_ddpm.data.source import Source
from jax_ddpm.errors import UserError
from jax_ddpm.evaluation.distances import nearest
from jax_ddpm.evaluation.extractors import make_extractor
from jax_ddpm.evaluation.features import Extractor, FeatureSet, extract
from jax_ddpm.evaluation.image_sets import (
    ImageSet,
    as_gray,
    file_set,
    noised,
    sample_set,
    split_set,
)
from jax_ddpm.evaluation.metrics import METRICS, Protocol, Result, check_possible, combine
from jax_ddpm.evaluation.reference import holds_moments, load_moments, reference_of
from jax_ddpm.inference.outputs import beside
from jax_ddpm.inference.trained import Trained
from jax_ddpm.runtime.stopping import Poll, never

_ROWS, _COLUMNS = 2, 10  # of pairs in the picture of nearest images, at most
NOISE_LEVELS = (8, 32)  # of the calibration: standard deviations on 0…255
# Writes a picture or curve beside the record, given the beginning of its path.
Drawing = Callable[[pathlib.Path], None]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The subject and the settings of a measurement.

    Attributes:
      cache: folder of earlier results: samples, features, terms of the bound.
      trained: the model; None to measure images in files.
      source: real data; None where ``reference`` is in files too.
      samples: a folder or ``.npz`` of images to measure in place of samples of the model.
      num_samples: images of each seed; None for all of the files'.
      seeds: of the samples.
      extractor: see ``make_extractor``.
      reference: "train" or "heldout", a folder or ``.npz`` of images, or an ``.npz`` of moments.
      split: of the bound.
      num_examples: of the split, None for all.
      calibrate: measure real images too, as they are and with noise.
      batch_size: of sampling, features and the bound.
    """

    cache: pathlib.Path
    trained: Trained | None
    source: Source | None
    samples: pathlib.Path | None = None
    num_samples: int | None = None
    seeds: tuple[int, ...] = (0,)
    extractor: str | None = None
    reference: str = "train"
    split: str = "heldout"
    num_examples: int | None = None
    calibrate: bool = False
    batch_size: int = 64

    def model(self) -> Trained:
        """The model, which must be there."""
        assert self.trained is not None
        return self.trained

    @cached_property
    def files(self) -> ImageSet | None:
        """The images of ``samples``."""
        return None if self.samples is None else file_set(self.samples)

    @cached_property
    def reference_files(self) -> ImageSet | None:
        """The real images, where they lie in files and not in the run's data or as moments."""
        path = pathlib.Path(self.reference)
        given = self.reference not in ("train", "heldout") and not holds_moments(path)
        return file_set(path) if given else None


def measure_quality(
    what: Evaluation, metrics: list[str], poll: Poll = never
) -> tuple[dict[str, Any], list[Drawing]]:
    """The parts of a record, and pictures.

    The parts are ``measured``, the results of the samples by name, each with its protocol;
    ``calibration``, those of real images; ``extractor_accuracy``.

    Raises:
      UserError: where these images cannot be measured so.
    """
    files = what.files
    shape = files.shape() if files else what.model().spec.image_shape
    if _real_images_are_gray(what):
        shape = (*shape[:2], 1)
    extractor = make_extractor(what.extractor, shape)

    def features(images: ImageSet, count: int) -> FeatureSet:
        if images.shape() == (*shape[:2], 3) and shape[2] == 1:
            images = as_gray(images)
        if images.shape() != shape:
            raise UserError(
                f"samples are {_text(shape)}, real images {_text(images.shape())}: bring both to "
                "one size"
            )
        return extract(extractor, images, count, what.batch_size, what.cache, poll)

    protocol = _protocol(what, metrics, extractor, features)
    count = what.num_samples or (files.count if files else 0)
    conditions = () if files else what.model().model.sampling_conditions.names
    labelled = files.labels is not None if files else "label" in conditions
    check_possible(metrics, protocol, count, labelled)
    real_sets = _calibration_sets(what, count) if what.calibrate else {}

    sets = [files] if files else _sample_sets(what, poll)
    samples = [features(images, count) for images in sets]
    compared = [name for name in metrics if name not in ("memorisation", "agreement")]
    record = {
        "measured": {
            name: {"protocol": _conditions(protocol, metric, shape, count), "result": result}
            for metric in metrics
            for name, result in _measure(metric, samples, protocol).items()
        },
        "calibration": {
            row: {
                name: result
                for metric in compared
                for name, result in _measure(metric, [features(images, count)], protocol).items()
            }
            for row, images in real_sets.items()
        },
        "extractor_accuracy": extractor.accuracy,
    }
    pictured = "memorisation" in metrics
    return record, [partial(_draw_nearest, samples[0], protocol)] if pictured else []


def _protocol(
    what: Evaluation,
    metrics: list[str],
    extractor: Extractor,
    features: Callable[[ImageSet, int], FeatureSet],
) -> Protocol:
    """The protocol with the real images that these metrics need."""

    def all_features(split: str) -> FeatureSet:
        images = _real_set(what, split)
        return features(images, images.count)

    reference = heldout = None
    if any(METRICS[name].needs_reference for name in metrics):
        path = pathlib.Path(what.reference)
        if holds_moments(path):
            reference = load_moments(path, extractor)
        else:
            reference = reference_of(all_features(what.reference))
    if "memorisation" in metrics and what.source and what.reference == "train":
        heldout = all_features("heldout")
    return Protocol(extractor, reference, heldout)


def _conditions(
    protocol: Protocol, metric: str, shape: tuple[int, int, int], count: int
) -> dict[str, Any]:
    """The conditions that two comparable values of a metric share, as JSON."""
    conditions = {
        "image_shape": list(shape),
        "num_images": count,
        "extractor": protocol.extractor.record,
    }
    if METRICS[metric].needs_reference and protocol.reference is not None:
        conditions["reference"] = protocol.reference.record
    return conditions | METRICS[metric].settings


def _measure(metric: str, seeds: list[FeatureSet], protocol: Protocol) -> dict[str, Result]:
    """The results of a metric by name, each combined over the seeds."""
    per_seed = [METRICS[metric].measure(samples, protocol) for samples in seeds]
    return {name: combine([results[name] for results in per_seed]) for name in per_seed[0]}


def _sample_sets(what: Evaluation, poll: Poll) -> list[ImageSet]:
    """The samples of each seed."""
    assert what.num_samples is not None
    return [
        sample_set(what.model(), seed, what.num_samples, what.batch_size, what.cache, poll)
        for seed in what.seeds
    ]


def _real_set(what: Evaluation, reference: str) -> ImageSet:
    if reference == what.reference and what.reference_files:
        return what.reference_files
    assert what.source is not None
    return split_set(what.source, reference)


def _real_images_are_gray(what: Evaluation) -> bool:
    """Whether samples must be gray to be compared with them."""
    if what.source is not None:
        return what.source.spec.image_shape[-1] == 1
    return what.reference_files is not None and what.reference_files.shape()[-1] == 1


def _calibration_sets(what: Evaluation, count: int) -> dict[str, ImageSet]:
    """Real images that are not the reference, as they are and with noise.

    Raises:
      UserError: where there are fewer real images than samples.
    """
    split = "train" if what.reference == "heldout" else "heldout"
    real = _real_set(what, split)
    if real.count < count:
        raise UserError(
            f"--calibrate measures as many real images as samples, {count:,}, but {split} has "
            f"{real.count:,}; ask for no more by --num_samples"
        )
    return {split: real} | {f"{split} + noise {std}": noised(real, std) for std in NOISE_LEVELS}


def _draw_nearest(samples: FeatureSet, protocol: Protocol, stem: pathlib.Path) -> None:
    """The samples that lie closest to a training image, each above that image."""
    real = protocol.real()
    found = nearest(samples.everything().features, real.everything().features)
    closest = np.argsort(found.distance)
    columns = min(_COLUMNS, samples.count)
    rows = [
        images.read(index[start : start + columns])
        for start in range(0, columns * min(_ROWS, samples.count // columns), columns)
        for images, index in ((samples.images, closest), (real.images, found.neighbour[closest]))
    ]
    path = stem.with_name(f"{stem.name}_nearest.png")
    pictures.save_grid(path, np.concatenate(rows), columns, note=beside(stem))


def _text(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
