"""Any set of uint8 images in one ``.npz`` file."""

import hashlib
import pathlib
import warnings

import numpy as np

from jax_ddpm.data.arrays import read_npz
from jax_ddpm.data.image_files import shortened
from jax_ddpm.data.source import (
    ArraySource,
    Batch,
    ClassNames,
    HeldoutFraction,
    Path,
    check_pair,
    hold_out,
)
from jax_ddpm.errors import UserError

_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
_MOST_CLASSES = 1_000_000  # each has a row of numbers in the network


def npz(
    path: Path, heldout_fraction: HeldoutFraction = 0.1, class_names: ClassNames = ()
) -> ArraySource:
    """Images ``train_images`` uint8 ``[n, h, w]`` or ``[n, h, w, c]``, optionally ``train_labels``.

    ``test_images`` (and ``test_labels``) become the held-out split; without them a random
    ``heldout_fraction`` of the training images does, always the same. A warning names any other
    array, which is left out.

    Raises:
      UserError: naming the file and what is missing or misshapen in it.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"data.path: no file {path!r}; give the path of an .npz file")
    try:
        arrays = read_npz(file)
    except ValueError as error:
        raise UserError(f"{path}: not a readable .npz file ({error})") from error

    if "train_images" not in arrays:
        found = ", ".join(arrays) or "nothing"
        raise UserError(f"{path}: holds {found}; it needs an array 'train_images'")
    if others := sorted(arrays.keys() - {*_ARRAYS}):
        warnings.warn(
            f"{path}: left out: {shortened(others)}; arrays that count are {', '.join(_ARRAYS)}",
            stacklevel=2,
        )
    train = _split(path, arrays, "train")
    if "test_images" in arrays:
        splits = {"train": train, "heldout": _split(path, arrays, "test")}
        check_pair(path, **splits)
    else:
        splits = hold_out(train, heldout_fraction, path)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return ArraySource(splits, 256, f"npz/sha256-{digest}", class_names)


def _split(path: str, arrays: dict[str, np.ndarray], prefix: str) -> Batch:
    images = arrays[f"{prefix}_images"]
    if images.ndim == 3:
        images = images[..., None]
    shaped = images.ndim == 4 and images.shape[-1] in (1, 3) and images.size > 0
    if images.dtype != np.uint8 or not shaped:
        raise UserError(
            f"{path}: {prefix}_images is {images.dtype} {list(images.shape)}; it must be uint8 "
            "[n, height, width] or [n, height, width, 1 or 3] and not empty"
        )
    batch = {"image": images}
    if f"{prefix}_labels" in arrays:
        labels = arrays[f"{prefix}_labels"]
        whole = labels.shape == images.shape[:1] and labels.dtype.kind in "iu"
        if not whole or labels.min() < 0 or labels.max() >= _MOST_CLASSES:
            held = f" from {labels.min()} to {labels.max()}" if whole else ""
            raise UserError(
                f"{path}: {prefix}_labels is {labels.dtype} {list(labels.shape)}{held}; it must "
                f"hold {len(images)} integers from 0 up to {_MOST_CLASSES - 1:,} at most"
            )
        batch["label"] = labels.astype(np.int32)
    return batch
