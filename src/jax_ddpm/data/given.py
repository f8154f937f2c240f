"""Images that a user gives to be measured or edited: a file, a folder of them, or an ``.npz``."""

import pathlib
import warnings
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from jax_ddpm.data.arrays import read_npz
from jax_ddpm.data.decode import UnreadableError, decode
from jax_ddpm.data.image_files import SUFFIXES, list_images, one_size, probe, shortened
from jax_ddpm.errors import UserError

_REMEDY = "replace or remove it"


class GivenFiles(NamedTuple):
    """Images in files, decoded on request.

    Attributes:
      root: the folder of the files.
      names: paths relative to it, in their order.
      channels: 1 if all files are gray, else 3.
    """

    root: pathlib.Path
    names: list[str]
    channels: int

    def read(self, index: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n h w c"]:
        """The images of these numbers; raises UserError naming a damaged file."""
        return np.stack([self._load(self.root / self.names[i]) for i in index])

    def _load(self, file: pathlib.Path) -> UInt8[np.ndarray, "h w c"]:
        try:
            return decode(file.read_bytes(), 0, self.channels)
        except (UnreadableError, OSError) as error:
            raise UserError(f"{file}: cannot be read ({error}); {_REMEDY}") from error


class GivenArrays(NamedTuple):
    """The images of an ``.npz``, and the class asked for of each, if the file has it."""

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, " n"] | None


def given_files(path: pathlib.Path) -> GivenFiles:
    """An image, or those of a folder by the rule of ``data.image_files``.

    Raises:
      UserError: where there are none, they differ in size, or one cannot be opened.
    """
    root, names = (path, list_images(path)) if path.is_dir() else (path.parent, [path.name])
    if not names:
        raise UserError(f"{root}: no images there ({' '.join(SUFFIXES)})")
    infos, unreadable = probe(root, names)
    for name, error in unreadable.items():
        raise UserError(f"{root / name}: cannot be read ({error}); {_REMEDY}")
    one_size(root, infos, "give images of one size")
    # Not by the first alone: some encoders write a gray-looking colour image as a gray file.
    gray = all(info.gray for info in infos.values())
    return GivenFiles(root, names, 1 if gray else 3)


def are_files(path: pathlib.Path) -> bool:
    """Whether this is a folder or an image, and not an ``.npz``."""
    return path.is_dir() or path.name.lower().endswith(SUFFIXES)


def given_arrays(path: pathlib.Path) -> GivenArrays:
    """Reads an ``.npz`` with uint8 ``images`` (or a single array of any name), perhaps ``labels``.

    ``arr_0`` and ``arr_1`` are these too, as in the samples of guided-diffusion.

    Raises:
      UserError: naming the file and what is wrong with it.
    """
    try:
        arrays = read_npz(path)
    except ValueError as error:
        raise UserError(
            f"{path}: not a folder of images, an image nor a readable .npz ({error})"
        ) from error
    if arrays.keys() == {"arr_0", "arr_1"}:  # as np.savez calls them, and others' samples
        arrays = {"images": arrays["arr_0"], "labels": arrays["arr_1"]}
    images = arrays.get("images", next(iter(arrays.values())) if len(arrays) == 1 else None)
    shaped = images is not None and images.ndim == 4 and images.shape[-1] in (1, 3) and images.size
    if images is None or images.dtype != np.uint8 or not shaped:
        raise UserError(f"{path}: it must hold 'images', uint8 [n, height, width, 1 or 3]")
    labels = arrays.get("labels")
    if others := arrays.keys() - {"images", "labels"} if len(arrays) > 1 else ():
        warnings.warn(f"{path}: left out: {shortened([*others])}", stacklevel=2)
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        raise UserError(
            f"{path}: labels is {labels.dtype} {list(labels.shape)}; it must hold {len(images)} "
            "integers"
        )
    return GivenArrays(images, labels)


def given_images(path: pathlib.Path) -> UInt8[np.ndarray, "n h w c"]:
    """An image, or all of a folder or an ``.npz``; raises UserError as the readers above do."""
    if not are_files(path):
        return given_arrays(path).images
    files = given_files(path)
    return files.read(np.arange(len(files.names)))
