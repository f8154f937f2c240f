"""The check that every measured array passes."""

import numpy as np
from jaxtyping import Float, Float64

from jax_ddpm.errors import UserError


def finite(
    values: Float[np.ndarray, "*shape"], name: str = "features"
) -> Float64[np.ndarray, "*shape"]:
    """``values`` in float64.

    Raises:
      UserError: where some are not finite, with their number; they are never replaced.
    """
    bad = np.count_nonzero(~np.isfinite(values))
    if bad:
        raise UserError(
            f"{bad:,} of the {values.size:,} values of the {name} are not finite; "
            "mend the images or the weights that they come from"
        )
    return values.astype(np.float64, copy=False)
