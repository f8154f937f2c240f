"""The one reverse-sampling loop: ``lax.scan`` over a sampler's nodes, memory constant in steps."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_ddpm.diffusion.denoiser import X0_ESTIMATE, Conditioning, Denoiser
from jax_ddpm.diffusion.process import fold_in


class Sampler(NamedTuple):
    """A sampling method on a grid.

    Attributes:
      nodes: a tuple of float64 NumPy arrays made on the host, one row per evaluation of the
        denoiser: a step of a method with two evaluations has two rows.
      init: ``x → carry``, the history of multistep methods before the first step.
      step: ``(denoiser, x, node, carry, keys) → (x, carry, prediction)``; ``denoiser(x, t)`` has
        its conditioning bound, ``keys`` are one per example and fresh in every step.
    """

    nodes: Any
    init: Callable
    step: Callable

    @property
    def num_evaluations(self) -> int:
        """The number of calls of the denoiser for each sample."""
        return len(jax.tree.leaves(self.nodes)[0])


class Snapshots(NamedTuple):
    """k evenly spaced moments of a run; the last is its end."""

    x: Float[Array, "k batch *shape"]
    x0: Float[Array, "k batch *shape"]


def sample(
    sampler: Sampler,
    denoiser: Denoiser,
    x: Float[Array, "batch *shape"],
    keys: Any,
    conditioning: Conditioning,
    num_snapshots: int = 1,
    self_condition: bool = False,
) -> tuple[Float[Array, "batch *shape"], Snapshots]:
    """Runs the sampler from x and returns its end and ``num_snapshots`` snapshots.

    Nodes are cast to x's dtype. The noise of example i depends only on ``keys[i]``, whatever the
    rest of the batch. Snapshots hold x and the predicted x_0 (progressive generation). The denoiser
    under ``self_condition`` also gets its last x_0, at first 0, as ``conditioning["x0_estimate"]``
    (Chen et al. 2023, Analog bits).

    Raises:
      ValueError: where there are more snapshots than steps, or none.
    """
    num_steps = sampler.num_evaluations
    if not 1 <= num_snapshots <= num_steps:
        raise ValueError(f"{num_snapshots} snapshots of {num_steps} steps: take 1 to {num_steps}")
    nodes = jax.tree.map(lambda column: jnp.asarray(column, x.dtype), sampler.nodes)

    def body(state, row):
        x, carry, estimate, kept = state
        index, node = row
        given = conditioning | ({X0_ESTIMATE: estimate} if self_condition else {})
        bound = partial(_with_conditioning, denoiser, given)
        x, carry, prediction = sampler.step(bound, x, node, carry, fold_in(keys, index))
        # A slot is overwritten until its stretch of the run ends: no branch, no trajectory.
        slot = index * num_snapshots // num_steps
        kept = Snapshots(kept.x.at[slot].set(x), kept.x0.at[slot].set(prediction.x0))
        return (x, carry, prediction.x0 if self_condition else (), kept), None

    empty = jnp.zeros((num_snapshots, *x.shape), x.dtype)
    estimate = jnp.zeros_like(x) if self_condition else ()
    start = (x, sampler.init(x), estimate, Snapshots(empty, empty))
    (x, _, _, snapshots), _ = jax.lax.scan(body, start, (jnp.arange(num_steps), nodes))
    return x, snapshots


def _with_conditioning(denoiser: Denoiser, conditioning: Conditioning, x: Array, t: Array):
    return denoiser(x, t, conditioning)
