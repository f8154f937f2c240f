"""Whether samples lie closer to the training images than new images do.

This is a test of data copying after Meehan et al. 2020, by distances to the nearest training image
in some feature space (or of flattened pixels). Held-out images show how close new images lie.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int

from jax_ddpm.errors import UserError
from jax_ddpm.evaluation.distances import nearest
from jax_ddpm.evaluation.estimate import Estimate, Proportion, jackknife_error, proportion
from jax_ddpm.evaluation.finite import finite


class Memorisation(NamedTuple):
    """Distances to the nearest training image, of samples and of held-out images.

    Attributes:
      closer_share: P(d_sample < d_heldout) + ½·P(d_sample = d_heldout). It is ½ for samples that
        copy no more than new data would, 1 for copies, 0 for samples far from all data.
      closest_percent_share: the share of samples closer to a training image than the closest 1 % of
        the held-out images; 0.01 without copying.
      nearest_index: the training image nearest to each sample.
      sample_median: the median of the samples' distances, in units of the features.
      heldout_median: the median of the held-out images' distances.
    """

    closer_share: Estimate
    closest_percent_share: Proportion
    nearest_index: Int[np.ndarray, " samples"]
    sample_median: float
    heldout_median: float


def memorisation(
    samples: Float[np.ndarray, "samples d"],
    training: Float[np.ndarray, "training d"],
    heldout: Float[np.ndarray, "heldout d"],
    block: int = 256,
) -> Memorisation:
    """Compares the samples' distances to the training set with those of held-out images.

    Raises:
      UserError: where a feature is not finite, or there are fewer than 2 samples or held-out
        images, or no training images.
    """
    if min(len(samples), len(heldout)) < 2 or len(training) < 1:
        raise UserError(
            "memorisation takes 2 samples, 2 held-out images and 1 training image or more; there "
            f"are {len(samples)}, {len(heldout)} and {len(training)}"
        )
    samples = finite(samples, "features of the samples")
    training = finite(training, "features of the training images")
    heldout = finite(heldout, "features of the held-out images")
    of_samples, of_heldout = (nearest(x, training, block) for x in (samples, heldout))
    return Memorisation(
        closer_share=closer_share(of_samples.distance, of_heldout.distance),
        closest_percent_share=closest_percent_share(of_samples.distance, of_heldout.distance),
        nearest_index=of_samples.neighbour,
        sample_median=float(np.median(of_samples.distance)),
        heldout_median=float(np.median(of_heldout.distance)),
    )


def closer_share(
    sample: Float64[np.ndarray, " samples"], heldout: Float64[np.ndarray, " heldout"]
) -> Estimate:
    """P(d_sample < d_heldout) + ½·P(d_sample = d_heldout) over all pairs of two sets of distances.

    This is the Mann-Whitney statistic U over the number of pairs. Its standard error, from the
    jackknife over both sets, is DeLong et al.'s (1988); it is 0 where the sets do not overlap.
    """
    of_samples = 1 - _share_below(heldout, sample)
    of_heldout = _share_below(sample, heldout)

    def without_each(shares: np.ndarray) -> np.ndarray:
        return (shares.sum() - shares) / (len(shares) - 1)

    error = jackknife_error(without_each(of_samples), without_each(of_heldout))
    return Estimate(float(of_samples.mean()), error)


def closest_percent_share(
    sample: Float64[np.ndarray, " samples"], heldout: Float64[np.ndarray, " heldout"]
) -> Proportion:
    """The share of samples with d_sample < τ, the ⌈h/100⌉-th smallest of h held-out distances.

    Its mean is ⌈h/100⌉/(h+1) for samples and held-out images of one distribution. The interval
    counts the chance in the samples, not that in τ, so it needs many held-out images.
    """
    rank = -(-len(heldout) // 100)
    threshold = np.partition(heldout, rank - 1)[rank - 1]
    return proportion(int(np.sum(sample < threshold)), len(sample))


def _share_below(population: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The share of the population below each value, with ties counted half."""
    population = np.sort(population)
    below, up_to = (population.searchsorted(values, side) for side in ("left", "right"))
    return (below + up_to) / (2 * len(population))
