"""The Fréchet distance between Gaussians fitted to two sets of features (FID).

It is the Fréchet inception distance over Inception features (Heusel et al. 2017). Its estimate is
biased upwards, by an amount that falls as 1/N and depends on the model, so that only values at the
same N compare. Report N beside every value (Bińkowski et al. 2018).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from jax_ddpm.errors import UserError
from jax_ddpm.evaluation.finite import finite


class Moments(NamedTuple):
    """Mean, unbiased covariance and number of samples; None where the number is not known."""

    mean: Float64[np.ndarray, " d"]
    covariance: Float64[np.ndarray, "d d"]
    count: int | None  # type: ignore[assignment]  # in place of tuple.count


class MomentSums:
    """The moments of features that arrive in batches and are not kept.

    A batch of m with mean x̄ joins the n before it, of mean μ and scatter S (Chan et al. 1983):

        S ← S + Σ (x_i - x̄)(x_i - x̄)ᵀ + n·m/(n+m)·δδᵀ,   μ ← μ + m/(n+m)·δ,   δ = x̄ - μ.

    Every term is of the size of the spread, however far the features lie from 0. Sums are float64.
    """

    def __init__(self, width: int):
        self._count = 0
        self._mean = np.zeros(width)
        self._scatter = np.zeros((width, width))

    def add(self, features: Float[np.ndarray, "m d"]) -> None:
        """Adds a batch of one or more.

        Raises:
          UserError: where a feature is not finite.
        """
        features, seen = finite(features), self._count
        self._count += len(features)
        batch_mean = features.mean(axis=0)
        delta = batch_mean - self._mean
        between = np.sqrt(seen * len(features) / self._count) * delta
        rows = np.vstack([features - batch_mean, between])
        self._scatter += rows.T @ rows
        self._mean += len(features) / self._count * delta

    def moments(self) -> Moments:
        """The moments of all batches so far.

        Raises:
          UserError: where fewer than two samples have come.
        """
        if self._count < 2:
            raise UserError(f"a covariance takes 2 samples or more; there are {self._count}")
        return Moments(self._mean.copy(), self._scatter / (self._count - 1), self._count)


def moments(features: Float[np.ndarray, "n d"]) -> Moments:
    """The moments of n ≥ 2 feature vectors.

    Raises:
      UserError: where a feature is not finite or n < 2.
    """
    sums = MomentSums(features.shape[1])
    sums.add(features)
    return sums.moments()


def frechet_distance(a: Moments, b: Moments) -> float:
    """‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2·(Σ_a·Σ_b)^{1/2}), the squared W₂ distance of the Gaussians.

    See Dowson & Landau 1982. Σ_a·Σ_b has the eigenvalues of the symmetric Σ_a^{1/2}·Σ_b·Σ_a^{1/2},
    so two symmetric eigendecompositions give the trace of the root. The second leaves out
    directions in which Σ_a is 0 up to round-off.

    Raises:
      UserError: where the moments differ in width, hold values that are not finite, come from no
        more samples than features, or Σ is no covariance (the distance is negative).
    """
    _check(a, b)
    variances, directions = np.linalg.eigh(a.covariance)
    # The solver finds small eigenvalues accurately too if a matrix is graded, largest first.
    variances, directions = variances[::-1], directions[:, ::-1]
    kept = variances > len(variances) * np.finfo(np.float64).eps * variances[0]
    root = directions[:, kept] * np.sqrt(variances[kept])
    overlap = np.linalg.eigvalsh(root.T @ b.covariance @ root)
    trace_of_root = np.sqrt(np.maximum(overlap, 0)).sum()

    spread = np.trace(a.covariance) + np.trace(b.covariance)
    distance = np.sum((a.mean - b.mean) ** 2) + spread - 2 * trace_of_root
    if distance < -1e-6 * spread:
        raise UserError(
            f"the Fréchet distance is {distance:.3g}: one of the covariances is not positive "
            "semi-definite; compute its moments anew in float64"
        )
    return float(max(distance, 0.0))


def _check(a: Moments, b: Moments) -> None:
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"moments of {a.mean.size} and of {b.mean.size} features do not compare; "
            "take both from the same network and layer"
        )
    for values in (*a[:2], *b[:2]):
        finite(values, "moments")
    for count in (a.count, b.count):
        if count is not None:
            require_covariance(count, a.mean.size)


def require_covariance(count: int, width: int) -> None:
    """Raises UserError where so few samples give a singular covariance of so many features."""
    if count <= width:
        raise UserError(
            f"{count:,} samples are too few for a covariance of {width:,} features; "
            f"take more than {width:,}, or --metrics=kid"
        )
