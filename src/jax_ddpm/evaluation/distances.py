"""Distances between every pair of two sets, block by block, so that memory stays bounded."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int


class Nearest(NamedTuple):
    """The nearest neighbour of each point: its distance and its index in the other set."""

    distance: Float64[np.ndarray, " n"]
    neighbour: Int[np.ndarray, " n"]


def blocks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover 0, …, count-1 in order."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def squared_distances(
    x: Float64[np.ndarray, "m d"], y: Float64[np.ndarray, "n d"], block: int
) -> Iterator[tuple[slice, Float64[np.ndarray, "rows n"]]]:
    """‖x_i - y_j‖² for ``block`` rows i at a time and all j, with the slice of these rows.

    It is computed as ‖x_i‖² + ‖y_j‖² - 2·x_i·y_j and never below 0. Centre the points around 0
    first, where cancellation loses least. The cost is 2·m·n·d operations, in 8·block·n bytes a few
    times over.
    """
    x_squared, y_squared = np.sum(x**2, axis=1), np.sum(y**2, axis=1)
    for rows in blocks(len(x), block):
        squared = x_squared[rows, None] + y_squared - 2 * (x[rows] @ y.T)
        yield rows, np.maximum(squared, 0)


def nearest(x: Float[np.ndarray, "m d"], y: Float[np.ndarray, "n d"], block: int = 256) -> Nearest:
    """The nearest y_j of each x_i in Euclidean distance, in float64; any one among equals.

    The distance of the pair found is recomputed from its difference, so that a copy is at exactly
    0. Both sets must be finite. Cost and memory are those of ``squared_distances``.
    """
    origin = y.mean(axis=0, dtype=np.float64)
    x, y = x - origin, y - origin
    distance, neighbour = np.empty(len(x)), np.empty(len(x), np.int64)
    for rows, squared in squared_distances(x, y, block):
        neighbour[rows] = squared.argmin(axis=1)
        distance[rows] = np.linalg.norm(x[rows] - y[neighbour[rows]], axis=1)
    return Nearest(distance, neighbour)
