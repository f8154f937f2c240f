"""The share of samples that a classifier assigns to the class that was asked for."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jax_ddpm.errors import UserError
from jax_ddpm.evaluation.estimate import Proportion, proportion


class Agreement(NamedTuple):
    """``overall`` and ``per_class`` shares of agreement, the latter for each class requested;
    ``confusion[r, p]`` counts the samples requested as class r and predicted as p."""

    overall: Proportion
    per_class: dict[int, Proportion]
    confusion: Int[np.ndarray, "classes classes"]


def agreement(
    requested: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"], num_classes: int
) -> Agreement:
    """The share of n ≥ 1 samples predicted as requested, with labels 0, …, num_classes-1.

    The classifier's own mistakes count against the samples, so report beside it the agreement of
    the classifier with the labels of held-out images.

    Raises:
      UserError: where a label is out of range or there are no samples.
    """
    if not len(requested):
        raise UserError("agreement takes 1 sample or more; there are none")
    for labels, name in ((requested, "requested"), (predicted, "predicted")):
        if labels.min() < 0 or labels.max() >= num_classes:
            raise UserError(
                f"the {name} labels span {labels.min()} to {labels.max()}, those of {num_classes} "
                f"classes 0 to {num_classes - 1}; use the classifier of the same classes"
            )
    confusion = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(confusion, (requested, predicted), 1)
    hits, counts = confusion.diagonal(), confusion.sum(axis=1)
    return Agreement(
        overall=proportion(int(hits.sum()), len(requested)),
        per_class={
            int(c): proportion(int(hits[c]), int(counts[c])) for c in np.flatnonzero(counts)
        },
        confusion=confusion,
    )
