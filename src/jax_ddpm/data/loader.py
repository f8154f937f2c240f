"""Training batches in the order of the plan, prepared in advance."""

import collections
import itertools
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from jax_ddpm.data.plan import batch_indices
from jax_ddpm.data.source import Batch, Source


class Loader:
    """The batches of the steps ``start``, ``start + 1``, … without end.

    A background thread is up to ``ahead`` steps in front of the batch that was yielded last. What
    goes wrong in it is raised at its own step.

    Args:
      shard: (k, n) yields the k-th of n equal parts of every batch, which host k of n loads.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        batch_size: int,
        start: int,
        shard: tuple[int, int] = (0, 1),
        ahead: int = 2,
    ):
        self._source = source
        self._seed = seed
        self._batch_size = batch_size
        self._shard = shard
        self._steps = itertools.count(start)
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: collections.deque[Future[Batch]] = collections.deque()
        for _ in range(ahead):
            self._prepare_one()

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        self._prepare_one()
        return self._pending.popleft().result()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Prepares no more, without waiting for the batch at work."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _prepare_one(self) -> None:
        self._pending.append(self._thread.submit(self._load, next(self._steps)))

    def _load(self, step: int) -> Batch:
        num_examples = self._source.spec.split_sizes["train"]
        indices = batch_indices(self._seed, step, self._batch_size, num_examples)
        part, num_parts = self._shard
        return self._source.batch("train", np.split(indices, num_parts)[part])
