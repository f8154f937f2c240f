"""The kernel distance between two sets of features (KID, Bińkowski et al. 2018).

It is unbiased at every number of samples and assumes no Gaussians, unlike the Fréchet distance.
"""

import numpy as np
from jaxtyping import Float, Float64

from jax_ddpm.errors import UserError
from jax_ddpm.evaluation.distances import blocks
from jax_ddpm.evaluation.estimate import Estimate, jackknife_error
from jax_ddpm.evaluation.finite import finite


def polynomial_kernel(
    x: Float64[np.ndarray, "m d"], y: Float64[np.ndarray, "n d"]
) -> Float64[np.ndarray, "m n"]:
    """k(x, y) = (x·y/d + 1)³."""
    base = x @ y.T / x.shape[1] + 1
    return base * base * base


def kernel_distance(
    x: Float[np.ndarray, "m d"], y: Float[np.ndarray, "n d"], block: int = 256
) -> Estimate:
    """The unbiased estimate of MMD² from all pairs (Gretton et al. 2012, eq. 3).

        Σ_{i≠j} k(x_i, x_j)/(m(m-1)) + Σ_{i≠j} k(y_i, y_j)/(n(n-1)) - 2·Σ_{ij} k(x_i, y_j)/(mn)

    It may be negative: its mean is 0 where the distributions are the same. The standard error is
    the delete-one jackknife over both sets. It is too large where they are (nearly) the same, by √2
    at most for large sets, because the statistic has no linear part there.

    The kernel is summed over ``block`` rows at a time, in 2·d·(m² + mn + n²) float64 operations,
    with 8·block·max(m, n) bytes a few times over beside the features.

    Raises:
      UserError: where a feature is not finite or a set has fewer than 3 vectors.
    """
    x, y = finite(x), finite(y)
    if min(len(x), len(y)) < 3:
        raise UserError(
            f"the kernel distance takes 3 samples or more on either side; there are {len(x)} "
            f"and {len(y)}"
        )
    within_x, within_y = _sums_within(x, block), _sums_within(y, block)
    across_x, across_y = _sums_across(x, y, block)

    def mean_within(sums: np.ndarray) -> float:
        return sums.sum() / (len(sums) * (len(sums) - 1))

    def without_each(within: np.ndarray, across: np.ndarray, others: int) -> np.ndarray:
        # Leaving out element i removes k(i, j) and k(j, i) from the sum over pairs of its own set.
        n = len(within)
        own = (within.sum() - 2 * within) / ((n - 1) * (n - 2))
        return own - 2 * (across.sum() - across) / ((n - 1) * others)

    m, n = len(x), len(y)
    value = mean_within(within_x) + mean_within(within_y) - 2 * across_x.sum() / (m * n)
    error = jackknife_error(
        without_each(within_x, across_x, n), without_each(within_y, across_y, m)
    )
    return Estimate(float(value), error)


def _sums_within(x: np.ndarray, block: int) -> np.ndarray:
    """Σ_{j≠i} k(x_i, x_j) for each i."""
    sums = np.empty(len(x))
    for rows in blocks(len(x), block):
        kernel = polynomial_kernel(x[rows], x)
        np.fill_diagonal(kernel[:, rows], 0)
        sums[rows] = kernel.sum(axis=1)
    return sums


def _sums_across(x: np.ndarray, y: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Σ_j k(x_i, y_j) for each i, and Σ_i k(x_i, y_j) for each j."""
    over_y, over_x = np.empty(len(x)), np.zeros(len(y))
    for rows in blocks(len(x), block):
        kernel = polynomial_kernel(x[rows], y)
        over_y[rows] = kernel.sum(axis=1)
        over_x += kernel.sum(axis=0)
    return over_y, over_x
