"""Images as they are: the one place that converts between uint8 and [-1, 1]."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jax_ddpm.data.source import Spec


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Pixels:
    """Pixels 0, …, num_levels-1 evenly spaced over [-1, 1] (a ``Codec``)."""

    shape: tuple[int, ...]
    num_levels: int = 256
    bounded: ClassVar[bool] = True
    record: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def with_levels(self, num_levels: int) -> "Pixels":
        """The same for batches of other levels."""
        return dataclasses.replace(self, num_levels=num_levels)

    def encode(self, batch: Mapping[str, Any], keys: Any = None) -> Float[Array, "batch *shape"]:
        """The images of a batch in [-1, 1]."""
        levels = jnp.asarray(batch["image"])
        return levels.astype(jnp.result_type(float)) * (2 / (self.num_levels - 1)) - 1

    def decode(self, x: Float[Array | np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
        """[-1, 1] to 0…255, rounded to the nearest and clipped."""
        return np.clip(np.round((np.asarray(x) + 1) * 127.5), 0, 255).astype(np.uint8)


PICTURES = Pixels((), 256)  # of any shape: what reads and writes 0…255


def pixels(spec: Spec, read: Any = None) -> Pixels:
    """Pixels are diffused; no other run is read."""
    return Pixels(spec.image_shape, spec.num_levels)
