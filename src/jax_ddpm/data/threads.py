"""One function over many files, in threads."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_AT_ONCE = 256  # by one thread: a future for each file costs too much


def over_files(function: Callable[[str], T], files: Sequence[str]) -> dict[str, T]:
    """What the function gives for each file, in their order."""
    chunks = [files[i : i + _AT_ONCE] for i in range(0, len(files), _AT_ONCE)]
    with ThreadPoolExecutor() as pool:
        done = pool.map(lambda chunk: [(file, function(file)) for file in chunk], chunks)
        return dict(pair for pairs in done for pair in pairs)
