"""MNIST and its kin, in the IDX format."""

import gzip
import hashlib
import math
import pathlib
import zlib

import numpy as np

from jax_ddpm.data.arrays import require_room
from jax_ddpm.data.source import ArraySource, Batch, ClassNames, Path, check_pair
from jax_ddpm.errors import UserError

_PREFIXES = {"train": "train", "heldout": "t10k"}


def idx(path: Path, class_names: ClassNames = ()) -> ArraySource:
    """Gray images and labels from the folder that holds MNIST's four files, plain or ``.gz``.

    Raises:
      UserError: naming the file and what is wrong with it.
    """
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise UserError(f"data.path: no folder {path!r}; give the folder of the four IDX files")
    splits = {split: _split(folder, prefix) for split, prefix in _PREFIXES.items()}
    check_pair(path, **splits)
    digest = hashlib.sha256()
    for batch in splits.values():
        digest.update(batch["image"].tobytes() + batch["label"].tobytes())
    identity = f"idx/sha256-{digest.hexdigest()[:16]}"
    return ArraySource(splits, 256, identity, class_names)


def _split(folder: pathlib.Path, prefix: str) -> Batch:
    images = _read(folder, f"{prefix}-images-idx3-ubyte", 3)
    labels = _read(folder, f"{prefix}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise UserError(
            f"{folder}: {len(images)} images but {len(labels)} labels in {prefix}-…-ubyte; take "
            "both files from one data set"
        )
    return {"image": images[..., None], "label": labels.astype(np.int32)}


def _read(folder: pathlib.Path, name: str, ndim: int) -> np.ndarray:
    """One file: bytes 0, 0, 8 (uint8), the number of axes, their lengths as uint32, the data."""
    file = next((f for f in (folder / name, folder / f"{name}.gz") if f.is_file()), None)
    if file is None:
        raise UserError(
            f"{folder}: no file {name} or {name}.gz in it; the four files must be named as on "
            "MNIST's page, yann.lecun.com/exdb/mnist"
        )
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as opened:
            header = opened.read(4 + 4 * ndim)
            if header[:4] != bytes([0, 0, 8, ndim]):
                raise UserError(
                    f"{file}: not IDX data of bytes in {ndim} {'axis' if ndim == 1 else 'axes'} "
                    f"(begins with {header[:4].hex(' ') or 'nothing'}); copy or download it again"
                )
            shape = [int.from_bytes(header[i : i + 4]) for i in range(4, len(header), 4)]
            size = math.prod(shape)
            require_room(size)
            data = opened.read(size + 1)  # no more, however much it would unpack to
    except (OSError, EOFError, zlib.error, ValueError, MemoryError) as error:
        raise UserError(f"{file}: cannot be read ({error}); copy or download it again") from error

    if len(shape) != ndim or len(data) != size or not data:
        held = "more" if len(data) > size else f"{len(data):,}"
        raise UserError(
            f"{file}: has {held} bytes of data for the shape {shape}; copy or download it again"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)
