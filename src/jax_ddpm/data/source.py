"""The source contract: indices → batch of arrays, and a spec."""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from jax_ddpm.data.image_files import shortened
from jax_ddpm.errors import UserError
from jax_ddpm.options import Option, Unfit, Where, between

Batch = dict[str, np.ndarray]
_MOST_SHOWN = 12  # classes in a line

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
    int, Option("Resize and crop to a square; 0: as they are.", between(0, 2**14), default=0)
]
HeldoutFraction = Annotated[
    float,
    Option(
        "Part of the images to hold out at random, where they have no split of their own.",
        Where(lambda value: 0 < value < 1, "between 0 and 1"),
        default=0.1,
    ),
]
Channels = Annotated[
    int,
    Option("Of images: 3, colour, or 1, gray.", Where(lambda x: x in (1, 3), "1 or 3"), default=3),
]
ClassNames = Annotated[
    tuple[str, ...],
    Option(
        "Names of the classes in their order; (): their numbers.",
        Where(
            lambda names: all(map(str.strip, names)) and len({*names}) == len(names),
            "different names, or ()",
        ),
        default=(),
        free=True,
    ),
]


class Field(NamedTuple):
    """One array of a batch, as a single example has it.

    Attributes:
      shape: without the axis of examples.
      dtype: NumPy's name of it, such as "uint8".
      num_values: values are 0, …, num_values-1, such as levels, classes or tokens; 0: any values.
      names: what the values are called, if they have names.
    """

    shape: tuple[int, ...]
    dtype: str
    num_values: int = 0
    names: tuple[str, ...] = ()


class Spec(NamedTuple):
    """What a source holds: ``image``, ``label`` where there are classes, and any other arrays.

    Attributes:
      identity: names the data in records; it tells any other data apart.
      formerly: what earlier versions called the same data, by names and sizes alone.
    """

    fields: dict[str, Field]
    split_sizes: dict[str, int]
    identity: str
    formerly: str = ""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        height, width, channels = self.fields["image"].shape
        return height, width, channels

    @property
    def num_levels(self) -> int:
        """The number of values of a pixel: 256 for most images. It sets the likelihood's unit."""
        return self.fields["image"].num_values

    @property
    def num_classes(self) -> int:
        """0 without labels."""
        return self.fields["label"].num_values if "label" in self.fields else 0

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, or their numbers as text."""
        names = self.fields["label"].names if "label" in self.fields else ()
        return names or tuple(map(str, range(self.num_classes)))

    def classes(self) -> str:
        """The classes in words, with their numbers if they have names."""
        if not self.num_classes or not self.fields["label"].names:
            return f"{self.num_classes} classes"
        numbered = [f"{number}: {name}" for number, name in enumerate(self.class_names)]
        more = ["…"] * (len(numbered) > _MOST_SHOWN)
        return f"{self.num_classes} classes ({', '.join([*numbered[:_MOST_SHOWN], *more])})"

    @property
    def example_bytes(self) -> int:
        """The memory that an example takes."""
        fields = self.fields.values()
        return sum(math.prod(field.shape) * np.dtype(field.dtype).itemsize for field in fields)

    def as_noted(self, earlier: "Spec") -> "Spec":
        """Itself, by the name that ``earlier`` has for it if that is from an earlier version."""
        if not self.formerly or earlier.identity != self.formerly:
            return self
        warnings.warn(
            f"the data is {earlier.identity} as noted before, by names and sizes; whether the "
            "contents were the same cannot be known",
            stacklevel=2,
        )
        return self._replace(identity=earlier.identity)

    def meaning(self) -> dict[str, Any]:
        """What must agree for two sources to hold the same data, as JSON.

        Names are left out: data stays the same under other ones.
        """

        def values(field: Field) -> str:
            shape = "×".join(map(str, field.shape)) or "one"
            return f"{shape} of {field.num_values or 'any'} values"

        fields = {name: values(field) for name, field in self.fields.items()}
        return {**fields, "split_sizes": self.split_sizes, "identity": self.identity}


def image_spec(
    image_shape: Iterable[int],
    num_levels: int,
    num_classes: int,
    split_sizes: dict[str, int],
    identity: str,
    class_names: tuple[str, ...] = (),
    formerly: str = "",
) -> Spec:
    """The spec of uint8 images and, unless ``num_classes`` is 0, of int32 labels."""
    fields = {"image": Field(tuple(image_shape), "uint8", num_levels)}
    if num_classes:
        fields["label"] = Field((), "int32", num_classes, class_names)
    return Spec(fields, split_sizes, identity, formerly)


@runtime_checkable
class Source(Protocol):
    """Random access to a data set with the splits "train" and "heldout"."""

    spec: Spec

    def batch(self, split: str, indices: Int[np.ndarray, " n"]) -> Batch:
        """The arrays of ``spec.fields``, each ``[n, *shape]``.

        ``image`` is uint8 ``[n, h, w, c]`` in 0…num_levels-1; ``label``, with classes, is int32.
        """
        ...


@runtime_checkable
class InMemory(Source, Protocol):
    """A source that can give a whole split at once."""

    def arrays(self, split: str) -> Batch:
        """The whole split, as ``batch`` of all its indices."""
        ...


class ArraySource:
    """A data set that fits in memory, with any arrays beside ``image``.

    Classes are the numbers from 0 up to the greatest ``label``.

    Raises:
      ValueError: where ``class_names`` are given and are not one for each class.
    """

    def __init__(
        self,
        splits: dict[str, Batch],
        num_levels: int,
        identity: str,
        class_names: tuple[str, ...] = (),
    ):
        labels = [split["label"] for split in splits.values() if "label" in split]
        num_classes = 1 + max((int(split.max()) for split in labels), default=-1)
        if class_names and len(class_names) != num_classes:
            raise Unfit("class_names", class_names, f"one name for each of {num_classes} classes")
        num_values = {"image": num_levels, "label": num_classes}
        names = {"label": tuple(class_names)}
        fields = {
            name: Field(
                array.shape[1:], array.dtype.name, num_values.get(name, 0), names.get(name, ())
            )
            for name, array in splits["train"].items()
        }
        self._splits = splits
        self.spec = Spec(
            fields, {name: len(split["image"]) for name, split in splits.items()}, identity
        )
        if num_classes:
            warn_of_empty_classes(identity, self.spec.class_names, splits["train"]["label"])

    def arrays(self, split: str) -> Batch:
        """The whole split."""
        return self._splits[split]

    def batch(self, split: str, indices: Int[np.ndarray, " n"]) -> Batch:
        return {name: array[indices] for name, array in self._splits[split].items()}


def random_split(
    count: int, fraction: float, where: str = "data"
) -> dict[str, Int[np.ndarray, " n"]]:
    """The training and the held-out examples among ``count``.

    They are random and always the same: ``RandomState`` has a frozen stream (NEP 19).

    Raises:
      UserError: naming ``where``, if one of the two is empty.
    """
    order = np.random.RandomState(0).permutation(count)
    held_out, train = np.split(order, [round(count * fraction)])
    if not len(held_out) or not len(train):
        raise UserError(
            f"{where}: {count} are too few images to hold out data.heldout_fraction={fraction:g} "
            f"of them; {'lower' if len(held_out) else 'raise'} it, or add images"
        )
    return {"train": train, "heldout": held_out}


def hold_out(batch: Batch, fraction: float, where: str = "data") -> dict[str, Batch]:
    """Splits arrays with ``random_split``."""
    return {
        split: {name: array[indices] for name, array in batch.items()}
        for split, indices in random_split(len(batch["image"]), fraction, where).items()
    }


def warn_of_empty_classes(
    where: str, names: Sequence[str], labels: Int[np.ndarray, " n"] | list[int]
) -> None:
    """Names the classes that none of the training labels is of."""
    counts = np.bincount(labels, minlength=len(names))
    if empty := [name for name, count in zip(names, counts, strict=True) if not count]:
        warnings.warn(
            f"{where}: of {len(names)} classes, none of the training images is of "
            f"{shortened(empty)}; the model cannot learn them",
            stacklevel=3,
        )


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
