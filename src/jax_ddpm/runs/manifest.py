"""``manifest.json`` of a checkpoint: the SHA-256 of every file of its items.

Orbax itself restores damaged files without a warning.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterable

from jax_ddpm.runtime.files import read_json

_NAME = "manifest.json"


class Damaged(Exception):
    """A checkpoint whose files are not as written."""


def sign(path: pathlib.Path) -> None:
    """Puts the manifest into the folder of a checkpoint that is complete."""
    files = sorted(file for file in path.glob("*/**/*") if file.is_file())
    manifest = {file.relative_to(path).as_posix(): _digest(file) for file in files}
    (path / _NAME).write_text(json.dumps(manifest, indent=1) + "\n")


def verify(path: pathlib.Path, items: Iterable[str] | None = None) -> None:
    """Compares the files of the items (all by default) with the manifest.

    Raises:
      Damaged: naming the first file that is missing or differs.
    """
    try:
        manifest = dict(read_json(path / _NAME))
    except (OSError, ValueError, TypeError) as error:
        raise Damaged(f"{_NAME} cannot be read") from error
    held = {name.partition("/")[0] for name in manifest}
    wanted = held | {"params"} if items is None else set(items)
    for item in sorted(wanted - held):
        raise Damaged(f"{_NAME} knows no {item}")
    for name, digest in manifest.items():
        if name.partition("/")[0] not in wanted:
            continue
        try:
            found = _digest(path / name)
        except FileNotFoundError as error:
            raise Damaged(f"{name} is missing") from error
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from error
        if found != digest:
            raise Damaged(f"{name} has changed since it was written")


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
