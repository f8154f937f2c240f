"""The one reverse-sampling loop: ``lax.scan`` over a sampler's nodes, memory constant in steps."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_ddpm.diffusion.denoiser import Conditioning, Denoiser
from jax_ddpm.diffusion.process import fold_in


class Sampler(NamedTuple):
    """A sampling method on a grid.

    Attributes:
      nodes: a tuple of float64 NumPy arrays, one row per step, made on the host.
      init: ``x → carry``, the history of multistep methods before the first step.
      step: ``(denoiser, x, node, carry, keys) → (x, carry, prediction)``; ``denoiser(x, t)`` has
        its conditioning bound, ``keys`` are one per example and fresh in every step.
    """

    nodes: Any
    init: Callable
    step: Callable


class Snapshots(NamedTuple):
    """k evenly spaced moments of a run, the last of them its end."""

    x: Float[Array, "k batch *shape"]
    x0: Float[Array, "k batch *shape"]


def sample(
    sampler: Sampler,
    denoiser: Denoiser,
    x: Float[Array, "batch *shape"],
    keys: Any,
    conditioning: Conditioning,
    num_snapshots: int = 1,
) -> tuple[Float[Array, "batch *shape"], Snapshots]:
    """Runs the sampler from x and returns its end and ``num_snapshots`` snapshots.

    Nodes are cast to x's dtype. ``keys[i]`` alone decides the noise of example i, whatever the
    batch around it. Snapshots hold x and the predicted x_0 (progressive generation).

    Raises:
      ValueError: where there are more snapshots than steps, or none.
    """
    num_steps = len(jax.tree.leaves(sampler.nodes)[0])
    if not 1 <= num_snapshots <= num_steps:
        raise ValueError(f"{num_snapshots} snapshots of {num_steps} steps: take 1 to {num_steps}")
    nodes = jax.tree.map(lambda column: jnp.asarray(column, x.dtype), sampler.nodes)
    bound = partial(_with_conditioning, denoiser, conditioning)

    def body(state, row):
        x, carry, kept = state
        index, node = row
        x, carry, prediction = sampler.step(bound, x, node, carry, fold_in(keys, index))
        # A slot is overwritten until its stretch of the run ends: no branch, no trajectory.
        slot = index * num_snapshots // num_steps
        kept = Snapshots(kept.x.at[slot].set(x), kept.x0.at[slot].set(prediction.x0))
        return (x, carry, kept), None

    empty = jnp.zeros((num_snapshots, *x.shape), x.dtype)
    start = (x, sampler.init(x), Snapshots(empty, empty))
    (x, _, snapshots), _ = jax.lax.scan(body, start, (jnp.arange(num_steps), nodes))
    return x, snapshots


def _with_conditioning(denoiser: Denoiser, conditioning: Conditioning, x: Array, t: Array):
    return denoiser(x, t, conditioning)
