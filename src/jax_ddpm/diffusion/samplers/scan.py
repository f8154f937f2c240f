"""The one reverse-sampling loop: ``lax.scan`` over a sampler's nodes, memory constant in steps."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jax_ddpm.diffusion.denoiser import X0_ESTIMATE, Conditioning
from jax_ddpm.diffusion.process import float_dtype, fold_in


def no_history(x: Array) -> tuple[()]:
    """What a method carries that looks back on nothing."""
    return ()


class Sampler(NamedTuple):
    """A sampling method on a grid.

    Attributes:
      nodes: a tuple of NumPy arrays made on the host, float64 where they hold real numbers, one row
        per evaluation of the denoiser: a step of a method with two evaluations has two rows.
      init: ``x → carry``, the history of multistep methods before the first step.
      step: ``(denoiser, x, node, carry, keys) → (x, carry, prediction)``; ``denoiser(x, t)`` has
        its conditioning bound, ``keys`` are one per example and fresh in every step.
      start: ``(keys, shape) → x``, where sampling starts: an example of ``shape`` for each key.
      show: ``prediction → x_0``, of x's shape and dtype.
    """

    nodes: Any
    init: Callable
    step: Callable
    start: Callable
    show: Callable = operator.attrgetter("x0")

    @property
    def num_evaluations(self) -> int:
        """The number of calls of the denoiser for each sample."""
        return len(jax.tree.leaves(self.nodes)[0])


class Snapshots(NamedTuple):
    """k evenly spaced moments of a run; the last is its end."""

    x: Shaped[Array, "k batch *shape"]
    x0: Shaped[Array, "k batch *shape"]


def sample(
    sampler: Sampler,
    denoiser: Callable,
    x: Shaped[Array, "batch *shape"],
    keys: Any,
    conditioning: Conditioning,
    num_snapshots: int = 1,
    self_condition: bool = False,
) -> tuple[Shaped[Array, "batch *shape"], Snapshots]:
    """Runs the sampler from x and returns its end and ``num_snapshots`` snapshots.

    Real numbers of the nodes are cast to x's dtype, or to the default float where x has none;
    integers and truth values stay as they are. The noise of example i depends only on ``keys[i]``,
    whatever the rest of the batch. Snapshots hold x after a step and the x_0 predicted before it,
    as the sampler shows it (progressive generation). The denoiser under ``self_condition`` also
    gets the last of these, at first 0, as
    ``conditioning["x0_estimate"]`` (Chen et al. 2023, Analog bits).

    Raises:
      ValueError: where there are more snapshots than steps, or none.
    """
    num_steps = sampler.num_evaluations
    if not 1 <= num_snapshots <= num_steps:
        raise ValueError(f"{num_snapshots} snapshots of {num_steps} steps: take 1 to {num_steps}")
    nodes = jax.tree.map(partial(_on_device, float_dtype(x)), sampler.nodes)

    def body(state, row):
        x, carry, estimate, kept = state
        index, node = row
        given = conditioning | ({X0_ESTIMATE: estimate} if self_condition else {})
        bound = partial(_with_conditioning, denoiser, given)
        x, carry, prediction = sampler.step(bound, x, node, carry, fold_in(keys, index))
        x0 = sampler.show(prediction)
        # A slot is overwritten until its stretch of the run ends: no branch, no trajectory.
        slot = index * num_snapshots // num_steps
        kept = Snapshots(kept.x.at[slot].set(x), kept.x0.at[slot].set(x0))
        return (x, carry, x0 if self_condition else (), kept), None

    empty = jnp.zeros((num_snapshots, *x.shape), x.dtype)
    estimate = jnp.zeros_like(x) if self_condition else ()
    start = (x, sampler.init(x), estimate, Snapshots(empty, empty))
    (x, _, _, snapshots), _ = jax.lax.scan(body, start, (jnp.arange(num_steps), nodes))
    return x, snapshots


def _on_device(dtype: Any, column: np.ndarray | Array) -> Array:
    return jnp.asarray(column, dtype if jnp.issubdtype(column.dtype, jnp.floating) else None)


def _with_conditioning(denoiser: Callable, conditioning: Conditioning, x: Array, t: Array):
    return denoiser(x, t, conditioning)
