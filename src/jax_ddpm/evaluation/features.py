"""Features of images, streamed over all devices and kept."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32

from jax_ddpm.data.plan import padded_batches
from jax_ddpm.errors import UserError
from jax_ddpm.evaluation.frechet import Moments, MomentSums
from jax_ddpm.evaluation.image_sets import ImageSet
from jax_ddpm.evaluation.result_cache import Arrays, ResultCache
from jax_ddpm.runtime.devices import compile_over, make_mesh, place, round_up, split, whole
from jax_ddpm.runtime.pipeline import run_ahead
from jax_ddpm.runtime.stopping import Poll, never


class Extractor(NamedTuple):
    """A network that measures images.

    Attributes:
      name: such as "inception"; the results carry it.
      apply: ``(params, images uint8 [b, h, w, c]) → (features [b, d], logits [b, k])``, float32.
      record: all that decides its output, as JSON: the weights' hash, how images are resized.
      accuracy: its accuracy on its own classes, as JSON, where that was measured.
      class_names: those of the classes that its logits are of, where they are the data's.
    """

    name: str
    apply: Callable
    params: Any
    record: dict[str, Any]
    accuracy: dict[str, Any] | None = None
    class_names: tuple[str, ...] = ()


class Features(NamedTuple):
    """An extractor's output for n images."""

    features: Float32[np.ndarray, "n d"]
    logits: Float32[np.ndarray, "n k"]


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureSet:
    """The first ``count`` images of a set with their features, read from the cache in batches."""

    images: ImageSet
    count: int
    batches: Callable[[], Iterator[Features]]

    def moments(self) -> Moments:
        """Mean and covariance; memory holds one batch at a time."""
        sums: MomentSums | None = None
        for batch in self.batches():
            sums = sums or MomentSums(batch.features.shape[1])
            sums.add(batch.features)
        assert sums is not None
        return sums.moments()

    def everything(self) -> Features:
        """All features and logits at once."""
        return Features(*map(np.concatenate, zip(*self.batches(), strict=True)))

    def pixels(self) -> Float32[np.ndarray, "n d"]:
        """The images themselves as vectors, in levels of 0…255."""
        return self.images.read(np.arange(self.count)).reshape(self.count, -1).astype(np.float32)


def extract(
    extractor: Extractor,
    images: ImageSet,
    count: int,
    batch_size: int,
    cache: pathlib.Path,
    poll: Poll = never,
) -> FeatureSet:
    """The features of the first ``count`` images, at full matmul precision.

    Each image passes exactly once, over all devices; results in the cache are not computed again.

    Raises:
      UserError: where there are fewer images.
    """
    if images.count < count:
        raise UserError(f"{count:,} images are wanted, but there are {images.count:,}")
    mesh = make_mesh()
    batch_size = round_up(batch_size, mesh)
    batches = padded_batches(images.count, batch_size)[: -(-count // batch_size)]
    apply = compile_over(extractor.apply, (whole(mesh), split(mesh)), split(mesh))
    params = place(extractor.params, whole(mesh))

    def launch(part: int) -> tuple[Any, Any]:
        # GPUs and TPUs round float32 products to 10 or 7 bits unless asked otherwise.
        with jax.default_matmul_precision("highest"):
            return apply(params, images.read(batches[part][0]))

    def compute(wanted: Iterable[int]) -> Iterator[tuple[int, Arrays]]:
        for part, (features, logits) in run_ahead(launch, wanted, poll):
            inside = batches[part][1]
            yield part, {"features": features[inside], "logits": logits[inside]}

    identity = {
        "computes": "features",
        "extractor": extractor.record,
        "images": images.identity,
        "batch_size": batch_size,
        # A set that grows fills its last batch only then, so the end is part of the identity.
        "ends_at": images.count if images.count % batch_size else None,
    }
    parts = ResultCache(cache, identity, Features._fields)
    parts.complete(len(batches), compute, f"{extractor.name} features")

    def stored() -> Iterator[Features]:
        for part in range(len(batches)):
            left = count - part * batch_size
            arrays = parts.load(part)
            yield Features(arrays["features"][:left], arrays["logits"][:left])

    return FeatureSet(images, count, stored)
