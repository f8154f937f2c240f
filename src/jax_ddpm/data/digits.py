"""The embedded default: scikit-learn's handwritten digits."""

import numpy as np

from jax_ddpm.data.source import ArraySource, hold_out


def digits() -> ArraySource:
    """1,797 gray 8×8 digits in 17 levels and 10 classes (Alpaydin & Kaynak 1998, UCI).

    A random fifth, always the same, is held out: the last fifth in file order was written by other
    people than the rest.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    batch = {
        "image": data.images.astype(np.uint8)[..., None],
        "label": data.target.astype(np.int32),
    }
    return ArraySource(
        hold_out(batch, 0.2), num_levels=17, identity="sklearn-digits/random-fifth-held-out"
    )
