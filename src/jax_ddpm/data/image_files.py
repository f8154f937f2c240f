"""Folders of image files: which files count, their order and their size.

Training, measuring and editing read folders by this one rule, and differ only in purpose. Training
makes all images colour, and of one size where ``data.image_size`` gives one; it leaves out a few
files that cannot be opened, with a warning. Measuring and editing take images as they are, gray
ones as gray; they refuse several sizes, or a file that cannot be read.
"""

import os
import pathlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from jax_ddpm.data.decode import FileInfo, UnreadableError, file_info
from jax_ddpm.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_OPENED_AT_ONCE = 256  # by one thread: a future for each file costs too much


class Probed(NamedTuple):
    """Files that can be opened, and why the others cannot, each in the order asked for."""

    infos: dict[str, FileInfo]
    unreadable: dict[str, UnreadableError]


def list_images(root: pathlib.Path, below: str = "") -> list[str]:
    """Paths relative to ``root`` of the images in its folder ``below``, however deeply nested.

    They have forward slashes and are sorted, whatever the file system's order. Hidden files and
    folders, and files of other suffixes than ``SUFFIXES``, are passed over.

    Raises:
      UserError: naming a folder that cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror}); permit it")

    images = []
    for parent, folders, files in os.walk(root / below, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = pathlib.Path(parent).relative_to(root)
        images += [
            (relative / name).as_posix()
            for name in files
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return sorted(images)


def probe(root: pathlib.Path, files: list[str], image_size: int = 0) -> Probed:
    """Opens all files, to be decoded to ``image_size``, and reads only their headers."""

    def open_one(file: str) -> FileInfo | UnreadableError:
        try:
            return file_info(str(root / file), image_size)
        except UnreadableError as error:
            return error

    chunks = [files[i : i + _OPENED_AT_ONCE] for i in range(0, len(files), _OPENED_AT_ONCE)]
    with ThreadPoolExecutor() as pool:
        opened = pool.map(lambda chunk: [(file, open_one(file)) for file in chunk], chunks)
        found = dict(pair for pairs in opened for pair in pairs)
    return Probed(
        {file: result for file, result in found.items() if isinstance(result, FileInfo)},
        {file: result for file, result in found.items() if isinstance(result, UnreadableError)},
    )


def one_size(root: pathlib.Path, infos: dict[str, FileInfo], remedy: str) -> tuple[int, int]:
    """Height and width of all images; raises UserError naming two that differ."""
    (first, (height, width, *_)), *others = infos.items()
    for other, info in others:
        if (info.height, info.width) != (height, width):
            raise UserError(
                f"{root}: {first} has {width}×{height} pixels but {other} has "
                f"{info.width}×{info.height}; {remedy}"
            )
    return height, width
