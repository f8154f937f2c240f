"""Numbers that carry their uncertainty."""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

_Z = NormalDist().inv_cdf(0.975)


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    standard_error: float


class Proportion(NamedTuple):
    """A share of ``count`` trials and the ends of its Wilson 95 % interval."""

    value: float
    low: float
    high: float
    count: int  # type: ignore[assignment]  # in place of tuple.count


def jackknife_error(*deleted: Float[np.ndarray, "_"]) -> float:
    """The standard error of a statistic of independent samples, each of its own distribution.

    ``deleted`` holds, for each sample of size n, the n values θ_(-i) of the statistic without its
    element i. The variances add up (Efron & Stein 1981; Arvesen 1969):

        σ² = Σ_samples (n-1)/n·Σ_i (θ_(-i) - mean θ_(-i))².
    """
    return float(np.sqrt(sum((len(values) - 1) * values.var() for values in deleted)))


def proportion(successes: int, count: int) -> Proportion:
    """k successes in n > 0 trials, with the 95 % score interval (Wilson 1927).

    Its ends are the shares p at which k lies z = 1.96 standard deviations from its mean,
    |k - n·p| = z·√(n·p·(1-p)). They are never outside [0, 1], and useful for k = 0 and k = n too.
    """

    def lower(k: int) -> float:
        root = (k * (count - k) / count + _Z**2 / 4) ** 0.5
        return (k + _Z**2 / 2 - _Z * root) / (count + _Z**2)

    return Proportion(successes / count, lower(successes), 1 - lower(count - successes), count)
