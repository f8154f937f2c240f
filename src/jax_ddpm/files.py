"""Files that are there whole or not at all."""

import contextlib
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields where to write, beside ``path`` and put in its place at the end, making its folder.

    Whoever opens ``path``, meanwhile or after a kill, finds the old file or the new one.
    """
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    partial.replace(path)
