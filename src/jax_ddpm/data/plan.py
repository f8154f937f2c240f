"""The index plan: which examples make up the batch of a step, a pure function of (seed, step)."""

import functools

import numpy as np
from jaxtyping import Int


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, num_examples: int) -> Int[np.ndarray, " n"]:
    # RandomState's stream is frozen (NEP 19), so runs repeat on any NumPy.
    return np.random.RandomState([seed, epoch]).permutation(num_examples)


def batch_indices(
    seed: int, step: int, batch_size: int, num_examples: int
) -> Int[np.ndarray, " batch"]:
    """Examples ``step·batch_size …`` of an endless row of epochs, each shuffled anew.

    Nothing is dropped where an epoch ends inside a batch, and any step can be computed directly.
    """
    position = step * batch_size + np.arange(batch_size)
    epochs, offsets = np.divmod(position, num_examples)
    return np.concatenate(
        [_epoch(seed, e, num_examples)[offsets[epochs == e]] for e in np.unique(epochs).tolist()]
    )


def padded_batches(
    num_examples: int, batch_size: int
) -> list[tuple[Int[np.ndarray, " batch"], np.ndarray]]:
    """Every example once, as (indices, mask) pairs of one size: padding repeats the last one."""
    batches = []
    for start in range(0, num_examples, batch_size):
        index = np.arange(start, start + batch_size)
        batches.append((np.minimum(index, num_examples - 1), index < num_examples))
    return batches
