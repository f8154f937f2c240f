"""Random changes to training images in levels 0, 1, …, one key per example."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped


def flip(keys: Any, images: Shaped[Array, "b h w c"]) -> Shaped[Array, "b h w c"]:
    """Mirrors images left to right, with probability 1/2 each."""
    coin = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(coin[:, None, None, None], images[:, :, ::-1], images)


def shift(keys: Any, images: Shaped[Array, "b h w c"], most: int) -> Shaped[Array, "b h w c"]:
    """Moves images by -most, …, most pixels down and across; uncovered pixels are 0, black."""

    def move(key: Any, image: Array) -> Array:
        top, left = jax.random.randint(key, (2,), 0, 2 * most + 1)
        padded = jnp.pad(image, ((most, most), (most, most), (0, 0)))
        return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)

    return jax.vmap(move)(keys, images)
