"""The objective of a classifier: from a batch of labelled images to a loss per example."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_ddpm.images import from_levels
from jax_ddpm.keys import StepKeys, Stream
from jax_ddpm.training import augmentation
from jax_ddpm.training.state import Metrics


@dataclasses.dataclass(frozen=True, eq=False)
class ClassificationObjective:
    """The cross-entropy -log p(label | x) in nats, for the parameters "network".

    Attributes:
      apply: the network, ``(params, x, dropout_keys) → (features, logits)``.
      num_levels: of the data, for scaling to [-1, 1].
      flip, shift: mirror images at random, and move them by up to so many pixels.
      augment: flips, shifts and dropout happen: False when measuring.
    """

    apply: Callable
    num_levels: int
    flip: bool
    shift: int
    augment: bool = True

    def init(self) -> Any:
        """No extra state."""
        return ()

    def measuring(self) -> "ClassificationObjective":
        """The same with nothing random."""
        return dataclasses.replace(self, augment=False)

    def __call__(
        self,
        params: dict[str, Any],
        extra: Any,
        batch: dict[str, Array],
        keys: StepKeys,
        step: Int[Array, ""],
    ) -> tuple[Float[Array, " batch"], Metrics, Any]:
        x, label = self._images(batch, keys), batch["label"]
        dropout_keys = keys.per_example(Stream.DROPOUT) if self.augment else None
        _, logits = self.apply(params["network"], x, dropout_keys)
        log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)
        correct = logits.argmax(axis=1) == label
        return -log_likelihood[:, 0], {"accuracy": (correct, jnp.ones_like(correct))}, extra

    def _images(self, batch: dict[str, Array], keys: StepKeys) -> Array:
        x = from_levels(batch["image"], self.num_levels)
        if not self.augment:
            return x
        flip_keys, shift_keys = jax.vmap(jax.random.split, out_axes=1)(
            keys.per_example(Stream.FLIP)
        )
        if self.flip:
            x = augmentation.flip(flip_keys, x)
        return augmentation.shift(shift_keys, x, self.shift) if self.shift else x
