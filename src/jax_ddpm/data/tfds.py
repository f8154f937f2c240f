"""Data sets prepared by TensorFlow Datasets, read without TensorFlow."""

import difflib
import hashlib
import json
import os
import pathlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from jax_ddpm.data.contents import file_hashes
from jax_ddpm.data.image_files import shortened
from jax_ddpm.data.lazy import Encoded, LazySource, keep_if_small
from jax_ddpm.data.source import (
    HeldoutFraction,
    ImageSize,
    Name,
    Path,
    Source,
    image_spec,
    random_split,
)
from jax_ddpm.data.splits import splits_among
from jax_ddpm.errors import UserError


def tfds(
    name: Name, path: Path = "", image_size: ImageSize = 0, heldout_fraction: HeldoutFraction = 0.1
) -> Source:
    """The feature ``image``, gray or colour, and the classes of ``label`` if it is a ClassLabel.

    ``name`` may have a config and a version (``imagenet_resized/64x64:0.1.0``); ``path`` is TFDS's
    ``data_dir``, with TFDS's own default. Nothing is ever downloaded. Images are cropped and
    resized to ``image_size``; 0: they have one size already. The split ``validation``, or else
    ``test`` or the like (``data.splits``), or else a random ``heldout_fraction`` of ``train``, is
    held out. A warning names any other split.

    Raises:
      UserError: naming the set, what is wrong with it, and the command that prepares it.
    """
    builder = _prepared_builder(name, path)
    info = builder.info
    sizes = {split: info.splits[split].num_examples for split in info.splits}
    stored = splits_among(sizes, f"data.name: {name!r}")
    if "train" not in stored:
        raise UserError(f"data.name: {name!r} has no split 'train', only {', '.join(sizes)}")
    if others := sizes.keys() - stored.values():
        warnings.warn(f"data.name: {name!r}: left out: {shortened([*others])}", stacklevel=2)
    if "heldout" in stored:
        rows = {split: np.arange(sizes[stored[split]]) for split in stored}
    else:
        rows = random_split(sizes[stored["train"]], heldout_fraction, f"data.name: {name!r}")
        stored["heldout"] = stored["train"]
    if not all(map(len, rows.values())):
        raise UserError(f"data.name: {name!r} has a split without images; prepare it anew")
    shape, names = _features(name, info, image_size)
    records = {split: _records(name, builder, stored[split]) for split in rows}
    split_sizes = {split: len(chosen) for split, chosen in rows.items()}
    parts = "/".join(f"{stored[split]}-{size}" for split, size in split_sizes.items())
    named = f"tfds/{info.full_name}/{parts}"
    spec = image_spec(
        image_shape=shape,
        num_levels=256,
        num_classes=len(names),
        split_sizes=split_sizes,
        identity=f"{named}/contents-{_contents(builder, stored)}/image-size-{image_size}",
        formerly=f"{named}/image-size-{image_size}",
        class_names=names,
    )

    def read(split: str, index: int) -> Encoded:
        row = int(rows[split][index])
        record = records[split][row]
        beside = {"label": int(record["label"])} if names else {}
        if beside and beside["label"] < 0:
            raise UserError(f"data.name: {name!r} lacks labels in its split {stored[split]!r}")
        title = f"{info.full_name}, {stored[split]} example {row}"
        return Encoded(title, record["image"], beside)

    return keep_if_small(LazySource(read, spec, image_size))


def _prepared_builder(name: str, path: str) -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError(
            "data.source=tfds needs TensorFlow Datasets: pip install 'jax-ddpm[tfds]'"
        ) from error
    _require_own(name, path)
    arguments = f"'{name}', file_format='array_record'" + (f", data_dir='{path}'" if path else "")
    command = (
        'python -c "import tensorflow_datasets as tfds; '
        f'tfds.builder({arguments}).download_and_prepare()"'
    )
    try:
        builder = tensorflow_datasets.builder(name, data_dir=path or None)
    except Exception as error:  # many kinds: an unknown version is an AssertionError
        known = tensorflow_datasets.list_builders(with_community_datasets=False)
        stem = name.partition(":")[0].partition("/")[0]
        if stem in known:
            raise UserError(f"data.name: {name!r}: {' '.join(str(error).split())}") from error
        close = ", ".join(difflib.get_close_matches(stem, known)) or "none"
        raise UserError(
            f"data.name: TensorFlow Datasets knows no {name!r}, nor is it prepared in "
            f"{path or 'its default data_dir'}; the closest known names: {close}"
        ) from error
    if not builder.info.splits:  # is_prepared() says the same but logs a warning
        raise UserError(
            f"data.name: {name!r} is not prepared in {builder.data_dir}; run once (most sets need "
            f"TensorFlow for this, reading them does not): {command}"
        )
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise UserError(
            f"data.name: {name!r} lies in {builder.data_dir} as {', '.join(formats)}, which has no "
            f"random access; remove it, or choose another data.path, and run once: {command}"
        )
    return builder


def _require_own(name: str, path: str) -> None:
    """Checks that opening the set neither reaches the network nor imports what its files name.

    Raises:
      UserError: where it would.
    """
    from tensorflow_datasets.core.naming import camelcase_to_snakecase
    from tensorflow_datasets.core.utils.file_utils import list_data_dirs

    namespace, _, rest = name.partition(":")
    if "://" in path or re.match("[A-Za-z_]", rest):
        raise UserError(
            f"data.name: {name!r} in {path or 'its default data_dir'} may lie elsewhere than on "
            "this machine; prepare a set of TensorFlow Datasets' own, such as cifar10"
        )
    stem = camelcase_to_snakecase(namespace.partition("/")[0])
    for folder in list_data_dirs(path or None):
        found = pathlib.Path(os.path.expanduser(folder), stem)
        for file in sorted([*found.glob("*/*.json"), *found.glob("*/*/*.json")]):
            try:
                foreign = [cls for cls in _classes(json.loads(file.read_text())) if not _own(cls)]
            except (OSError, ValueError, RecursionError) as error:
                raise UserError(
                    f"{file}: cannot be read ({error}); prepare the set anew"
                ) from error
            if foreign:
                raise UserError(
                    f"{file}: names {foreign[0]}, code that is not TensorFlow Datasets' own; take "
                    "a set without it"
                )


def _own(cls: Any) -> bool:
    return isinstance(cls, str) and cls.startswith("tensorflow_datasets.")


def _classes(stored: Any) -> Iterator[Any]:
    """The classes that a set's JSON names, at any depth; ``type`` was their key before 4.5."""
    inner = stored if isinstance(stored, list) else []
    if isinstance(stored, dict):
        keys = ("pythonClassName", "python_class_name", *["type"] * ("content" in stored))
        yield from (stored[key] for key in keys if key in stored)
        inner = [*stored.values()]
    for value in inner:
        yield from _classes(value)


def _features(
    name: str, info: Any, image_size: int
) -> tuple[tuple[int, int, int], tuple[str, ...]]:
    """Image shape and names of the classes."""
    from tensorflow_datasets import features

    found = dict(info.features.items())
    image, label = found.get("image"), found.get("label")
    if not (
        isinstance(image, features.Image)
        and image.np_dtype == np.uint8
        and image.shape[-1] in (1, 3)
    ):
        listing = ", ".join(f"{key}: {value}" for key, value in found.items())
        raise UserError(
            f"data.name: {name!r} needs a feature 'image', uint8 with 1 or 3 channels; it has "
            + " ".join(listing.split())
        )
    height, width, channels = image.shape
    if image_size:
        height = width = image_size
    if height is None or width is None:
        raise UserError(f"data.name: {name!r} has images of many sizes; set data.image_size")
    if not isinstance(label, features.ClassLabel):
        if label is not None:
            warnings.warn(
                f"data.name: {name!r}: no classes, as its label is no ClassLabel", stacklevel=3
            )
        return (height, width, channels), ()
    if not label.num_classes:
        raise UserError(
            f"data.name: {name!r}: its label does not say how many classes there are; prepare it "
            "anew with their number"
        )
    names = label.names
    return (height, width, channels), tuple(names)


def _contents(builder: Any, stored: dict[str, str]) -> str:
    """A digest of the files of these splits."""
    files = sorted(
        {file for split in stored.values() for file in builder.info.splits[split].filenames}
    )
    hashes = file_hashes(pathlib.Path(builder.data_dir), files)
    return hashlib.sha256("".join(hashes.values()).encode()).hexdigest()[:16]


def _records(name: str, builder: Any, split: str) -> Any:
    """Random access to the records of a split, with images as they are stored."""
    from tensorflow_datasets import decode

    try:
        records = builder.as_data_source(split, decoders={"image": decode.SkipDecoding()})
        records[0]  # opens the files
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"data.name: {name!r} is damaged ({reason}); remove {builder.data_dir} and prepare it "
            "again"
        ) from error
    return records
