"""Times of a continuous process, drawn from a density that is part of the objective."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, Float

from jax_ddpm.diffusion.process import Process
from jax_ddpm.diffusion.time_sampling import TIME_SAMPLERS, TimeSampler, spread


@runtime_checkable
class Density(Protocol):
    """A density of times, given by its quantile function and its distribution function."""

    def quantile(self, u: Float[Array, " batch"]) -> Float[Array, " batch"]:
        """The time below which a share u of all times lies."""
        ...

    def rank(self, t: Float[Array, " batch"]) -> Float[Array, " batch"]:
        """The share of all times that lies below t."""
        ...


@dataclasses.dataclass(frozen=True)
class UniformDensity:
    """Even between the ends of a process (its ``time_range``)."""

    low: float
    high: float

    def quantile(self, u):
        return self.low + u * (self.high - self.low)

    def rank(self, t):
        return (t - self.low) / (self.high - self.low)


@dataclasses.dataclass(frozen=True)
class LogNormalDensity:
    """log t ~ N(mean, std²): EDM's σ with -1.2 and 1.2 (Karras et al. 2022, table 1)."""

    mean: float
    std: float

    def quantile(self, u):
        return jnp.exp(self.mean + self.std * ndtri(u))

    def rank(self, t):
        return ndtr((jnp.log(t) - self.mean) / self.std)


@dataclasses.dataclass(frozen=True)
class LogitNormalDensity:
    """log(t/(1-t)) ~ N(mean, std²), for flows (Esser et al. 2024, section 3.1)."""

    mean: float
    std: float

    def quantile(self, u):
        return jax.nn.sigmoid(self.mean + self.std * ndtri(u))

    def rank(self, t):
        return ndtr((jnp.log(t) - jnp.log1p(-t) - self.mean) / self.std)


@dataclasses.dataclass(frozen=True)
class Continuous:
    """Times of a continuous process from a density, independent or spread evenly over the batch.

    The density is part of the objective: no weight undoes it.
    """

    density: Density
    stratified: bool = False

    def init(self) -> tuple[()]:
        return ()

    def draw(self, state, step, shared_key, keys, position):
        if self.stratified:
            u = spread(shared_key, position)
        else:
            u = jax.vmap(lambda key: jax.random.uniform(key, (), position.dtype))(keys)
        # u = 0 would give an infinite λ; a float32 in [0, 1) is 0 once in 2**23 draws.
        u = jnp.clip(u, 1e-6, 1 - 1e-6)
        return self.density.quantile(u), jnp.ones_like(position)

    def update(self, state, step, t, loss):
        return state

    def measuring(self) -> "Continuous":
        return Continuous(self.density, stratified=True)

    def rank(self, t):
        return self.density.rank(t)


def make_time_sampler(process: Process, name: str, mean: float, std: float) -> TimeSampler:
    """How the times of training are drawn: whole steps of a chain, else along a density.

    ``mean`` and ``std`` are those of "log_normal" and "logit_normal".
    """
    if process.num_timesteps:
        return TIME_SAMPLERS[name](process.num_timesteps)
    if name == "log_normal":
        return Continuous(LogNormalDensity(mean, std))
    if name == "logit_normal":
        return Continuous(LogitNormalDensity(mean, std))
    return Continuous(UniformDensity(*process.time_range), stratified=name == "stratified")
