"""Training batches in the order of the plan, prepared in advance."""

import sys

import numpy as np
from jaxtyping import Int

from jax_ddpm.data.plan import batch_indices
from jax_ddpm.data.source import Batch, Source

_ALL = slice(None)


class Loader:
    """The batches of the steps ``start``, ``start + 1``, … without end.

    While one is used, Grain prepares up to ``ahead`` more, each in its own thread; an error in a
    batch is raised at that batch's step. Grain handles whole batches, which a source reads in its
    own way: Grain's work on one element rivals the decoding of a small image.

    Args:
      rows: the places in each batch whose examples this process loads.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        batch_size: int,
        start: int,
        rows: Int[np.ndarray, " rows"] | slice = _ALL,
        ahead: int = 2,
    ):
        import grain  # only here: a set that lies on the devices needs none

        num_examples = source.spec.split_sizes["train"]

        def load(step: int) -> Batch:
            return source.batch("train", batch_indices(seed, step, batch_size, num_examples)[rows])

        steps = grain.MapDataset.range(start, sys.maxsize)
        threads = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
        self._batches = iter(steps.map(load).to_iter_dataset(threads))
        self._batches.start_prefetch()

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Prepares no more, without waiting for the batches at work."""
        self._batches.close()
