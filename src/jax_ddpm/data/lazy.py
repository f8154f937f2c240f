"""Sources whose images are decoded on request."""

import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jax_ddpm.data.decode import UnreadableError, decode
from jax_ddpm.data.source import Batch, Source, Spec
from jax_ddpm.errors import UserError

KEPT_BYTES = 2 * 2**30  # the most that decoded images may take
_READ_AT_ONCE = 256  # images at a time of a whole split, so that few lie in memory twice


class Encoded(NamedTuple):
    """An image as stored.

    Attributes:
      name: that in messages.
      content: the bytes of the file.
      beside: what else the example has, such as its ``label``.
    """

    name: str
    content: bytes
    beside: Mapping[str, Any]


class LazySource:
    """Reads and decodes the images of a batch in threads.

    A damaged image is replaced by the next readable one of its split, with all that is beside that
    one, so the image of an index depends only on the data, not on earlier requests.

    Args:
      read: (split, index) → the stored image.

    Raises:
      UserError: from ``batch``, when too many images prove damaged.
    """

    def __init__(self, read: Callable[[str, int], Encoded], spec: Spec, image_size: int):
        self.spec = spec
        self._read = read
        self._image_size = image_size
        self._damaged: set[str] = set()
        self._reporting = threading.Lock()
        self._pool = ThreadPoolExecutor()

    def batch(self, split: str, indices: Int[np.ndarray, " n"]) -> Batch:
        examples = list(self._pool.map(lambda index: self._example(split, index), indices.tolist()))
        return {
            name: np.array([example[name] for example in examples], field.dtype)
            for name, field in self.spec.fields.items()
        }

    def _example(self, split: str, index: int) -> dict[str, Any]:
        size = self.spec.split_sizes[split]
        for candidate in range(index, index + size):
            name, content, beside = self._read(split, candidate % size)
            try:
                image = decode(content, self._image_size, self.spec.image_shape[-1])
                return {"image": image, **beside}
            except UnreadableError as error:
                with self._reporting:
                    self._report(name, error)
        raise UserError(f"no image of the {split} split can be read; replace the data set")

    def _report(self, name: str, error: UnreadableError) -> None:
        if name in self._damaged:
            return
        self._damaged.add(name)
        total = sum(self.spec.split_sizes.values())
        if too_many(len(self._damaged), total):
            raise UserError(
                f"{name}: damaged ({error}), as are {len(self._damaged) - 1} more of {total} "
                "images; replace or remove them"
            )
        warnings.warn(
            f"{name}: damaged ({error}); the next image takes its place ({len(self._damaged)} of "
            f"{total} so far)",
            stacklevel=2,
        )


class KeptSource:
    """Keeps the images that it has given, so that later epochs are look-ups."""

    def __init__(self, source: Source):
        self.spec = source.spec
        self._source = source
        self._kept: dict[str, Batch] = {}
        self._known: dict[str, np.ndarray] = {}
        for split, size in self.spec.split_sizes.items():
            # The operating system gives pages memory only when they are written.
            self._kept[split] = {
                name: np.empty((size, *field.shape), field.dtype)
                for name, field in self.spec.fields.items()
            }
            self._known[split] = np.zeros(size, bool)

    def batch(self, split: str, indices: Int[np.ndarray, " n"]) -> Batch:
        self._read(split, indices)
        return {name: array[indices] for name, array in self._kept[split].items()}

    def arrays(self, split: str) -> Batch:
        """The whole split; images not yet kept are read now."""
        size = self.spec.split_sizes[split]
        for start in range(0, size, _READ_AT_ONCE):
            self._read(split, np.arange(start, min(start + _READ_AT_ONCE, size)))
        return self._kept[split]

    def _read(self, split: str, indices: Int[np.ndarray, " n"]) -> None:
        known = self._known[split]
        missing = np.unique(indices[~known[indices]])
        if missing.size:
            for name, values in self._source.batch(split, missing).items():
                self._kept[split][name][missing] = values
            known[missing] = True


def keep_if_small(source: Source) -> Source:
    """The source, which keeps its images if the whole set takes at most ``KEPT_BYTES``."""
    num_bytes = sum(source.spec.split_sizes.values()) * source.spec.example_bytes
    return KeptSource(source) if num_bytes <= KEPT_BYTES else source


def too_many(damaged: int, total: int) -> bool:
    """One damaged image can be an accident; more than 5 % mean that the set is faulty."""
    return damaged > max(1, 0.05 * total)
