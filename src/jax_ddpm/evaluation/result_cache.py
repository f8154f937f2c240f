"""Results of long computations, kept in parts on disk: a killed evaluation goes on from there."""

import hashlib
import json
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from jax_ddpm.data.arrays import read_npz
from jax_ddpm.errors import UserError
from jax_ddpm.runtime.distributed import from_first, is_first
from jax_ddpm.runtime.files import locked, replacing, sweep

Arrays = dict[str, np.ndarray]
# The numbers of the parts wanted → each with its arrays, in this order.
Compute = Callable[[Iterable[int]], Iterator[tuple[int, Arrays]]]


class ResultCache:
    """Parts 0, 1, … of the results of ``identity``, each a file below ``cache``, whole or absent.

    ``identity`` is JSON and must hold all that decides the arrays. Its hash is the folder's name,
    so every other identity has another folder, and runs can share a cache. ``names`` are those of
    the arrays in each part.
    """

    def __init__(self, cache: pathlib.Path, identity: dict[str, Any], names: Iterable[str]):
        self._names = set(names)
        text = json.dumps(identity, indent=2, sort_keys=True)
        self._folder = cache / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._identity = text

    def complete(self, count: int, compute: Compute, name: str) -> None:
        """Computes the parts among 0, …, count-1 that are missing, or damaged, which it says.

        A progress bar has this name.

        Raises:
          UserError: where another process computes them.
        """
        from tqdm import tqdm

        if not from_first(lambda: self._missing(count)):
            return
        with locked(self._folder, str(self._folder), f"computes {name}"):
            missing = from_first(lambda: self._missing(count, tell=True))
            from_first(lambda: sweep(self._folder))
            with replacing(self._folder / "identity.json") as file:
                file.write((self._identity + "\n").encode())
            done, quiet = count - len(missing), None if is_first() else True
            with tqdm(total=count, initial=done, desc=name, unit="batch", disable=quiet) as bar:
                for part, arrays in compute(missing):
                    with replacing(self._path(part)) as file:
                        np.savez(file, **arrays)  # type: ignore[arg-type]
                    bar.update()
            from_first(lambda: None)  # the first process has written all

    def _missing(self, count: int, tell: bool = False) -> list[int]:
        """The parts that are not there or not whole; it names the latter where it should tell."""
        missing = []
        for part in range(count):
            try:
                self.load(part)
            except UserError:
                missing.append(part)
                if tell and self._path(part).exists():
                    warnings.warn(
                        f"{self._path(part)} is damaged; computing it again", stacklevel=2
                    )
        return missing

    def load(self, part: int) -> Arrays:
        """The arrays of one part.

        Raises:
          UserError: naming the file, if it is damaged since ``complete`` has found it whole.
        """
        path = self._path(part)
        try:
            arrays = read_npz(path)
        except ValueError as error:
            raise UserError(f"{path} is damaged; the same command computes it again") from error
        if arrays.keys() != self._names:
            raise UserError(f"{path} holds other arrays; the same command computes it again")
        return arrays

    def _path(self, part: int) -> pathlib.Path:
        return self._folder / f"{part:06}.npz"
