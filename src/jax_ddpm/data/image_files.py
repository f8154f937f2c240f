"""Folders of image files: which files count, their order and their size.

Training, measuring and editing read folders by this one rule, and differ only in purpose. Training
makes all images colour, and of one size where ``data.image_size`` gives one; it leaves out a few
files that cannot be opened, with a warning. Measuring and editing take images as they are, gray
ones as gray; they refuse several sizes, or a file that cannot be read.
"""

import os
import pathlib
import warnings
from typing import NamedTuple

from jax_ddpm.data.decode import FORMATS, FileInfo, UnreadableError, file_info
from jax_ddpm.data.threads import over_files
from jax_ddpm.errors import UserError

SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)


class Probed(NamedTuple):
    """Files that can be opened, and why the others cannot, each in the order asked for."""

    infos: dict[str, FileInfo]
    unreadable: dict[str, UnreadableError]


def list_images(root: pathlib.Path) -> list[str]:
    """Paths relative to ``root`` of the images in it, however deeply nested.

    They have forward slashes and are sorted, whatever the file system's order. Links are followed,
    but a file counts once, by its own path if that is below ``root``. Hidden files and folders are
    passed over; a warning names whatever else is left out.

    Raises:
      UserError: naming a folder that cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror}); permit it")

    images, others, again = [], [], []
    seen: set[str] = set()  # real paths of files and folders

    def is_new(path: str, real: str) -> bool:
        if real in seen:
            again.append(path)
            return False
        seen.add(real)
        return True

    def take(path: str, real: str) -> None:
        if not path.lower().endswith(SUFFIXES):
            others.append(path)
        elif is_new(path, real):
            images.append(path)

    links = [""]  # followed when all is known that needs none
    for link in links:
        if not os.path.isdir(root / link):
            take(link, os.path.realpath(root / link))
            continue
        for parent, folders, files in os.walk(root / link, onerror=refuse):
            relative, real = pathlib.Path(parent).relative_to(root), os.path.realpath(parent)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if not is_new(relative.as_posix(), real):
                folders.clear()
                continue
            for name in [*folders, *sorted(name for name in files if not name.startswith("."))]:
                path = (relative / name).as_posix()
                if os.path.islink(root / path):
                    links.append(path)
                elif name not in folders:
                    take(path, os.path.join(real, name))
    if others:
        warnings.warn(
            f"{root}: left out, as no images by their names: {shortened(others)}; images end in "
            f"{' '.join(SUFFIXES)}",
            stacklevel=3,
        )
    if again:
        warnings.warn(
            f"{root}: left out, as links to what counts already: {shortened(again)}", stacklevel=3
        )
    return sorted(images)


def shortened(names: list[str]) -> str:
    """The first five in their order, after their number where there are more."""
    names = sorted(names)
    return ", ".join(names) if len(names) <= 5 else f"{len(names)}, {', '.join(names[:5])}, …"


def probe(root: pathlib.Path, files: list[str], image_size: int = 0) -> Probed:
    """Opens all files, to be decoded to ``image_size``, and reads only their headers."""

    def open_one(file: str) -> FileInfo | UnreadableError:
        try:
            return file_info(str(root / file), image_size)
        except UnreadableError as error:
            return error

    found = over_files(open_one, files)
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
