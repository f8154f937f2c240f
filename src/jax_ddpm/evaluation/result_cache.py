"""Results of long computations, kept in parts on disk: a killed evaluation goes on from there."""

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from jax_ddpm.errors import UserError
from jax_ddpm.runtime.distributed import from_first, is_first
from jax_ddpm.runtime.files import replacing

Arrays = dict[str, np.ndarray]
# The numbers of the parts wanted → each with its arrays, in this order.
Compute = Callable[[Iterable[int]], Iterator[tuple[int, Arrays]]]


class ResultCache:
    """Parts 0, 1, … of the results of ``identity``, each a file below ``cache``, whole or absent.

    ``identity`` is JSON and must hold all that decides the arrays. Its hash is the folder's name,
    so every other identity has another folder, and runs can share a cache.
    """

    def __init__(self, cache: pathlib.Path, identity: dict[str, Any]):
        text = json.dumps(identity, indent=2, sort_keys=True)
        self._folder = cache / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._identity = text

    def complete(self, count: int, compute: Compute, name: str) -> None:
        """Computes the missing parts among 0, …, count-1, with a progress bar of this name."""
        from tqdm import tqdm

        missing = from_first(
            lambda: [part for part in range(count) if not self._path(part).exists()]
        )
        if not missing:
            return
        with replacing(self._folder / "identity.json") as path:
            path.write_text(self._identity + "\n")
        done, quiet = count - len(missing), None if is_first() else True
        with tqdm(total=count, initial=done, desc=name, unit="batch", disable=quiet) as bar:
            for part, arrays in compute(missing):
                with replacing(self._path(part)) as path, path.open("wb") as file:
                    np.savez(file, **arrays)  # type: ignore[arg-type]
                bar.update()
        from_first(lambda: None)  # the first process has written all

    def load(self, part: int) -> Arrays:
        """The arrays of one part.

        Raises:
          UserError: naming the file, if it is damaged.
        """
        path = self._path(part)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        except Exception as error:  # zipfile can raise anything on damaged bytes
            raise UserError(f"{path}: cannot be read; remove it and repeat") from error

    def _path(self, part: int) -> pathlib.Path:
        return self._folder / f"{part:06}.npz"
