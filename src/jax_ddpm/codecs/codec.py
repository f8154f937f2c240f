"""The contract of a codec: images ↔ the arrays that are diffused."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, UInt8


@runtime_checkable
class Codec(Protocol):
    """Images of a data set as x_0 and back: a pytree, whose leaves are parameters that are frozen.

    Attributes:
      shape: that of one x_0, with any number of axes; the network and the sampler have it.
      num_levels: the values of a pixel in a batch.
      bounded: whether x_0 are the evenly spaced levels of pixels in [-1, 1]: only then is a
        predicted x_0 clipped, and only then has an image a likelihood in bits.
      record: the identity of its parameters, as JSON; {} where it has none.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def num_levels(self) -> int: ...

    @property
    def bounded(self) -> bool: ...

    @property
    def record(self) -> Mapping[str, Any]: ...

    def with_levels(self, num_levels: int) -> "Codec":
        """The same for batches of other levels: 256 for pictures from outside."""
        ...

    def encode(self, batch: Mapping[str, Any], keys: Any = None) -> Float[Array, "batch *shape"]:
        """x_0 of a batch, whose ``image`` is uint8 ``[batch, h, w, c]`` in 0, …, num_levels-1.

        A codec that draws takes a key for each example, and its mean without keys.
        """
        ...

    def decode(
        self, x: Float[Array | np.ndarray, "batch *shape"]
    ) -> UInt8[np.ndarray, "batch h w c"]:
        """Images in 0, …, 255, on the host, of an x that need not be an x_0 yet."""
        ...
