"""Batches for the train step: a set that fits lies on the devices, a larger one streams."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_ddpm.data.loader import Loader
from jax_ddpm.data.plan import batch_indices
from jax_ddpm.data.source import Batch, InMemory, Source
from jax_ddpm.runtime.devices import own_rows, split


class Feed:
    """This process's rows of the batches of steps ``start``, ``start + 1``, …; to be closed.

    Attributes:
      data: the training set for every device, where a batch is the places of its examples. It is {}
        for a set larger than ``data.resident_gigabytes`` or not held in memory, where a batch is
        the arrays themselves.
    """

    def __init__(
        self,
        config: ConfigDict,
        source: Source,
        mesh: Mesh,
        start: int,
    ):
        seed, batch_size = config.seed, config.training.batch_size
        rows = own_rows(split(mesh), batch_size)
        self._closing = contextlib.ExitStack()
        count = source.spec.split_sizes["train"]
        fits = count * source.spec.example_bytes <= 1e9 * config.data.resident_gigabytes
        self.data: Batch = source.arrays("train") if fits and isinstance(source, InMemory) else {}
        self._batches: Iterator[Batch]
        if self.data:
            self._batches = (
                {"index": batch_indices(seed, step, batch_size, count)[rows].astype(np.int32)}
                for step in itertools.count(start)
            )
        else:
            loader = Loader(source, seed, batch_size, start, rows)
            self._batches = self._closing.enter_context(loader)

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_: Any) -> None:
        self._closing.close()

    def take(self, count: int) -> Batch:
        """The next batches, each array ``[count, rows, …]``."""
        batches = list(itertools.islice(self._batches, count))
        return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
