"""Files that are there whole or not at all."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

from jax_ddpm.runtime.distributed import is_first


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields where to write, beside ``path`` and put in its place at the end, making its folder.

    Whoever opens ``path``, meanwhile or after a kill, finds the old file or the new one. Of several
    processes that all write the same file, the first one's is kept.
    """
    if not is_first():
        with tempfile.TemporaryDirectory() as scratch:
            yield pathlib.Path(scratch) / path.name
        return
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    partial.replace(path)
