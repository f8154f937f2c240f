"""Examples at random times, as every objective of denoising begins."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jax_ddpm.diffusion.family import Family
from jax_ddpm.diffusion.process import float_dtype
from jax_ddpm.diffusion.time_sampling import TimeSampler
from jax_ddpm.keys import StepKeys, Stream
from jax_ddpm.tasks.objective import Metrics


class Noised(NamedTuple):
    """x_t ~ q(x_t | x_0) with what was drawn for it: t, its importance weight and the noise.

    The noise is ε of a Gaussian family, and otherwise what the family's losses are about.
    """

    t: Float[Array, " batch"]
    importance: Float[Array, " batch"]
    xt: Shaped[Array, "batch *shape"]
    noise: Any


def noised(
    family: Family,
    time_sampler: TimeSampler,
    state: Any,
    x0: Shaped[Array, "batch *shape"],
    keys: StepKeys,
    step: Int[Array, ""],
) -> Noised:
    """Draws a time and noise for each example, under the time sampler's ``state``."""
    position = keys.index.astype(float_dtype(x0)) / keys.batch_size
    t, importance = time_sampler.draw(
        state, step, keys.shared(Stream.TIME), keys.per_example(Stream.TIME), position
    )
    xt, noise = family.corrupt(keys.per_example(Stream.NOISE), x0, t)
    return Noised(t, importance, xt, noise)


def by_quarter(
    name: str,
    value: Float[Array, " batch"] | Bool[Array, " batch"],
    drawn: Noised,
    time_sampler: TimeSampler,
) -> Metrics:
    """The mean of a value over each quarter of the times, whatever times were drawn more often."""
    quarter = jnp.floor(4 * time_sampler.rank(drawn.t))
    weights = [jnp.where(quarter == i, drawn.importance, 0) for i in range(4)]
    return {f"{name}_quarter{i + 1}": (value * w, w) for i, w in enumerate(weights)}
