"""Fidelity and diversity apart: the part of each set within the other's neighbourhoods.

The neighbourhood of a point is the closed ball that reaches to its k-th nearest neighbour in its
own set, not counting itself.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from jax_ddpm.errors import UserError
from jax_ddpm.evaluation.distances import squared_distances
from jax_ddpm.evaluation.finite import finite

_ROUND_OFF = 1e-12  # relative, of float64 sums over thousands of features


class Manifold(NamedTuple):
    """All in [0, 1] except density, whose mean is 1 for equal distributions and can be exceeded."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall_density_coverage(
    real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"], k: int = 5, block: int = 256
) -> Manifold:
    """Improved precision and recall, density and coverage.

        precision  the share of fake points within the neighbourhood of some real point
        recall     the share of real points within the neighbourhood of some fake point
        density    the mean number of real neighbourhoods that a fake point lies in, over k
        coverage   the share of real points whose neighbourhood holds some fake point

    The first two are from Kynkäänniemi et al. 2019, the others from Naeem et al. 2020. All depend
    on the numbers of points and on k. Points at the very edge are inside, up to round-off. The cost
    is 2·d·(n² + nm + m²) float64 operations, with the memory of ``squared_distances``.

    Raises:
      UserError: where a feature is not finite or a set has no more than k points.
    """
    if min(len(real), len(fake)) <= k:
        raise UserError(
            f"{min(len(real), len(fake))} samples are too few for {k} neighbours; "
            f"take more than {k}"
        )
    real, fake = finite(real, "real features"), finite(fake, "fake features")
    origin = real.mean(axis=0)
    real, fake = real - origin, fake - origin
    real_radius, fake_radius = _squared_radii(real, k, block), _squared_radii(fake, k, block)

    neighbourhoods = np.zeros(len(fake), np.int64)  # of real points, around each fake one
    recalled, covered = np.empty(len(real), bool), np.empty(len(real), bool)
    for rows, squared in squared_distances(real, fake, block):
        around_real = squared <= real_radius[rows, None]
        neighbourhoods += around_real.sum(axis=0)
        covered[rows] = around_real.any(axis=1)
        recalled[rows] = (squared <= fake_radius).any(axis=1)
    return Manifold(
        precision=float((neighbourhoods > 0).mean()),
        recall=float(recalled.mean()),
        density=float(neighbourhoods.mean() / k),
        coverage=float(covered.mean()),
    )


def _squared_radii(x: np.ndarray, k: int, block: int) -> Float64[np.ndarray, " n"]:
    """The squared distance from each point to its k-th nearest other point, plus round-off."""
    radii = np.empty(len(x))
    for rows, squared in squared_distances(x, x, block):
        np.fill_diagonal(squared[:, rows], np.inf)
        radii[rows] = np.partition(squared, k - 1, axis=1)[:, k - 1]
    # A point at the edge, or a copy at radius 0, is inside in whatever order the sums were taken.
    return radii + _ROUND_OFF * (radii + np.sum(x**2, axis=1))
