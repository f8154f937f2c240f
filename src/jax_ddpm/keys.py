"""Random keys: every draw is keyed by (seed, stream, step, global example index).

Results therefore do not depend on devices, hosts or the split of a batch, and resuming needs no
stored generator.
"""

import dataclasses
import enum
from typing import Any

import jax
from jaxtyping import Array, Int, Shaped

from jax_ddpm.errors import UserError


class Stream(enum.IntEnum):
    """The use of a key. Numbers are part of a run's identity: never reuse or renumber them."""

    PARAMETERS = 0
    TIME = 1
    NOISE = 2
    DROPOUT = 3
    FLIP = 4
    LABEL_DROP = 5
    SAMPLE_PRIOR = 6
    SAMPLE_STEPS = 7
    HELD_OUT = 8
    BOUND = 9
    CODING = 10
    CALIBRATION = 11
    SELF_CONDITION = 12
    OPTIMAL_VARIANCE = 13
    LIKELIHOOD = 14
    PHASE = 15
    NETWORK = 16
    CODEC = 17


def seed_key(seed: int) -> Any:
    """The key of a seed from 0 to 2**32 - 1.

    Raises:
      UserError: for any other, of which JAX would take the remainder.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed={seed}: it must be in [0, {2**32 - 1}]")
    return jax.random.key(seed)


def stream_key(seed: Any, stream: Stream) -> Any:
    """The key of one stream under a seed's key."""
    return jax.random.fold_in(seed, int(stream))


def numbered_key(seed: Any, stream: Stream, number: int) -> Any:
    """The seed key of the ``number``-th of several that draw alike; of the first, the seed's."""
    return jax.random.fold_in(stream_key(seed, stream), number) if number else seed


def example_keys(key: Any, index: Int[Array, " batch"]) -> Any:
    """One key for each global example index."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepKeys:
    """The keys of one training step.

    ``index`` holds the place of each example in the global batch of ``batch_size`` examples, or
    only those of one device where the step is mapped over devices along mesh axes ``axes``.
    """

    seed: Any
    step: Int[Array, ""]
    index: Int[Array, " batch"]
    batch_size: int = dataclasses.field(metadata={"static": True})
    axes: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

    def shared(self, stream: Stream) -> Any:
        """One key for the whole global batch."""
        return jax.random.fold_in(stream_key(self.seed, stream), self.step)

    def per_example(self, stream: Stream) -> Any:
        """One key per example."""
        return example_keys(self.shared(stream), self.index)

    def take(self, index: Int[Array, " part"]) -> "StepKeys":
        """The keys of a part of the batch."""
        return dataclasses.replace(self, index=index)

    def gather(self, values: Shaped[Array, "here ..."]) -> Shaped[Array, "everywhere ..."]:
        """Per-example values of all devices, one device after another."""
        if not self.axes:
            return values
        return jax.lax.all_gather(values, self.axes, tiled=True)
