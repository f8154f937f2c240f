"""The source contract: indices → batch of arrays, and a spec."""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

Batch = dict[str, np.ndarray]


class Spec(NamedTuple):
    """What a source holds.

    ``num_levels`` is how many values a pixel can take (256 for images; it sets the likelihood's
    unit), ``num_classes`` is 0 without labels, ``identity`` names data and split in records.
    """

    image_shape: tuple[int, int, int]
    num_levels: int
    num_classes: int
    split_sizes: dict[str, int]
    identity: str


@runtime_checkable
class Source(Protocol):
    """Random access to a data set with the splits "train" and "heldout"."""

    spec: Spec

    def batch(self, split: str, indices: Int[np.ndarray, " n"]) -> Batch:
        """``image`` uint8 ``[n, h, w, c]`` in 0…num_levels-1 and, with classes, ``label`` int32."""
        ...


class ArraySource:
    """A data set that fits in memory."""

    def __init__(self, splits: dict[str, Batch], num_levels: int, identity: str):
        images: UInt8[np.ndarray, "n h w c"] = splits["train"]["image"]
        labels = [split["label"] for split in splits.values() if "label" in split]
        self._splits = splits
        self.spec = Spec(
            image_shape=images.shape[1:],
            num_levels=num_levels,
            num_classes=1 + max((int(split.max()) for split in labels), default=-1),
            split_sizes={name: len(split["image"]) for name, split in splits.items()},
            identity=identity,
        )

    def batch(self, split: str, indices: Int[np.ndarray, " n"]) -> Batch:
        return {name: array[indices] for name, array in self._splits[split].items()}


def hold_out(batch: Batch, fraction: float) -> dict[str, Batch]:
    """Splits at random, the same way always: ``RandomState`` has a frozen stream (NEP 19)."""
    count = len(batch["image"])
    order = np.random.RandomState(0).permutation(count)
    held_out, train = np.split(order, [round(count * fraction)])
    return {
        "train": {name: array[train] for name, array in batch.items()},
        "heldout": {name: array[held_out] for name, array in batch.items()},
    }
