"""Files that exist whole or not at all; JSON from files that may be anything."""

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from jax_ddpm.runtime.distributed import is_first


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a path beside ``path`` to write to, moves it into place at the end, makes its folder.

    A reader of ``path``, meanwhile or after a kill, finds the old file or the new one. The first
    process's file is kept where several processes write the same file.
    """
    if not is_first():
        with tempfile.TemporaryDirectory() as scratch:
            yield pathlib.Path(scratch) / path.name
        return
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: pathlib.Path) -> Any:
    """What a file holds as JSON.

    Raises:
      ValueError: where it is no JSON, or nested too deep.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deep") from error
