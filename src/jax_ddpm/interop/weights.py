"""Steps that converting any network's weights takes."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from jax_ddpm.errors import UserError


def checked(
    state_dict: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """The arrays of ``state_dict`` in float64, if its names and shapes are exactly ``shapes``.

    Raises:
      UserError: naming the first array that is missing, misshapen or unknown.
    """
    for name in [*shapes, *state_dict]:
        expected = list(shapes[name]) if name in shapes else "absent"
        found = list(state_dict[name].shape) if name in state_dict else "absent"
        if found != expected:
            raise UserError(
                f"weights of another architecture: {name} is {found} and should be {expected}"
            )
    return {name: state_dict[name].astype(np.float64) for name in shapes}


def fold_batch_norm(
    weight: Float[np.ndarray, "o i h w"],
    scale: Float[np.ndarray, " o"],
    offset: Float[np.ndarray, " o"],
    mean: Float[np.ndarray, " o"],
    variance: Float[np.ndarray, " o"],
    epsilon: float,
) -> dict[str, np.ndarray]:
    """A convolution and the batch norm after it as one: ``kernel`` ``[h, w, i, o]`` and ``bias``.

    γ·(W∗x - μ)/√(σ² + ε) + β = (g·W)∗x + (β - g·μ) with the gain g = γ/√(σ² + ε). The arguments'
    dtype, in which it is computed, should be float64; the result is float32.
    """
    gain = scale / np.sqrt(variance + epsilon)
    kernel = np.transpose(weight, (2, 3, 1, 0)) * gain
    bias = offset - gain * mean
    return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}
