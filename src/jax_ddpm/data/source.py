"""The source contract: indices → batch of arrays, and a spec."""

from typing import Annotated, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from jax_ddpm.errors import UserError
from jax_ddpm.options import Option, not_negative

Batch = dict[str, np.ndarray]

# Options of sources. Those without a default must be given.
Path = Annotated[
    str, Option("Place of the file or folder; for tfds its data_dir.", default="", free=True)
]
Name = Annotated[
    str,
    Option(
        'Name of the tfds set, such as "cifar10" or "imagenet_resized/64x64:0.1.0".', default=""
    ),
]
ImageSize = Annotated[
    int, Option("Resize and crop to a square; 0: as they are.", not_negative, default=0)
]


class Spec(NamedTuple):
    """What a source holds.

    ``num_levels`` is the number of values of a pixel (256 for images; it sets the likelihood's
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


@runtime_checkable
class InMemory(Source, Protocol):
    """A source that can give a whole split at once."""

    def arrays(self, split: str) -> Batch:
        """The whole split, as ``batch`` of all its indices."""
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

    def arrays(self, split: str) -> Batch:
        """The whole split."""
        return self._splits[split]

    def batch(self, split: str, indices: Int[np.ndarray, " n"]) -> Batch:
        return {name: array[indices] for name, array in self._splits[split].items()}


def random_split(count: int, fraction: float) -> dict[str, Int[np.ndarray, " n"]]:
    """The training and the held-out examples among ``count``.

    They are random and always the same: ``RandomState`` has a frozen stream (NEP 19).
    """
    order = np.random.RandomState(0).permutation(count)
    held_out, train = np.split(order, [round(count * fraction)])
    return {"train": train, "heldout": held_out}


def hold_out(batch: Batch, fraction: float) -> dict[str, Batch]:
    """Splits arrays with ``random_split``."""
    return {
        split: {name: array[indices] for name, array in batch.items()}
        for split, indices in random_split(len(batch["image"]), fraction).items()
    }


def check_pair(path: str, train: Batch, heldout: Batch) -> None:
    """Checks that two splits of a user's belong together.

    Raises:
      UserError: naming ``path``, where only one has labels, or the held-out split has images of
        another size or classes that training does not reach.
    """
    if heldout.keys() != train.keys():
        raise UserError(f"{path}: give labels for both training and test images, or for neither")
    if train["image"].shape[1:] != heldout["image"].shape[1:]:
        raise UserError(f"{path}: training and test images differ in size or channels")
    if "label" in train and heldout["label"].max() > train["label"].max():
        raise UserError(f"{path}: the test labels hold classes that the training labels do not")
