"""The inception score (Salimans et al. 2016)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jax_ddpm.errors import UserError
from jax_ddpm.evaluation.finite import finite


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the splits: not a standard error of the mean."""

    value: float
    std: float


def inception_score(logits: Float[np.ndarray, "n classes"], splits: int = 10) -> InceptionScore:
    """Mean and std over ``splits`` consecutive parts of exp E_x KL(p(y|x) ‖ p(y)).

    p(y|x) is the softmax of a classifier's logits, p(y) its mean over the part. The score lies
    between 1 and the number of classes, grows with the size of the parts, and sees only the
    samples, no data.

    Raises:
      UserError: where a logit is not finite or n < splits.
    """
    n = len(logits)
    if n < splits:
        raise UserError(
            f"the inception score in {splits} parts takes {splits} samples or more; there are {n}"
        )
    logits = finite(logits, "logits")
    log_p = logits - _log_sum_exp(logits, axis=1)
    bounds = np.arange(1, splits) * n // splits
    scores = [np.exp(_mutual_information(part)) for part in np.split(log_p, bounds)]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def _mutual_information(log_p: np.ndarray) -> float:
    """E_x KL(p(y|x) ‖ p(y)) in nats."""
    log_marginal = _log_sum_exp(log_p, axis=0) - np.log(len(log_p))
    return np.sum(np.exp(log_p) * (log_p - log_marginal), axis=1).mean()


def _log_sum_exp(values: np.ndarray, axis: int) -> np.ndarray:
    largest = values.max(axis=axis, keepdims=True)
    return largest + np.log(np.exp(values - largest).sum(axis=axis, keepdims=True))
