"""Drawing t in training: uniformly, stratified over the global batch, or by the loss's size.

A time sampler is ``init() → state``, ``draw(state, step, …) → (t, weight)`` and
``update(state, step, t, loss) → state``; ``weight`` makes the weighted loss an unbiased estimate of
its mean over uniform t. This file has those of a chain, ``time_densities`` those of continuous
time.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@runtime_checkable
class TimeSampler(Protocol):
    """Draws t for each example of the global batch."""

    def init(self) -> Any:
        """The state before the first step: a pytree, () where there is none."""
        ...

    def draw(
        self,
        state: Any,
        step: Int[Array, ""],
        shared_key: Any,
        keys: Any,
        position: Float[Array, " batch"],
    ) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
        """Times and importance weights.

        ``shared_key`` is the same for the whole global batch, ``keys`` are one per example, and
        ``position`` is each example's global index over the global batch size, in [0, 1).
        """
        ...

    def update(
        self,
        state: Any,
        step: Int[Array, ""],
        t: Float[Array, " batch"],
        loss: Float[Array, " batch"],
    ) -> Any:
        """The state after (a part of) the step's batch with these losses, weights not applied."""
        ...

    def measuring(self) -> "TimeSampler":
        """The same density without state, spread evenly over a batch, for held-out data."""
        ...

    def rank(self, t: Float[Array, " batch"]) -> Float[Array, " batch"]:
        """The place of t among the times, in [0, 1): for metrics by quarters of time."""
        ...


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Independent uniform t (Ho et al. 2020)."""

    num_timesteps: int

    def init(self) -> Any:
        return ()

    def draw(self, state, step, shared_key, keys, position):
        u = jax.vmap(lambda key: jax.random.randint(key, (), 0, self.num_timesteps))(keys)
        return u.astype(position.dtype), jnp.ones_like(position)

    def update(self, state, step, t, loss):
        return state

    def measuring(self) -> "Stratified":
        return Stratified(self.num_timesteps)

    def rank(self, t):
        return t / self.num_timesteps


@dataclasses.dataclass(frozen=True)
class Stratified(Uniform):
    """Times spread evenly over the global batch by a shared offset (Kingma et al. 2021, app. I)."""

    def draw(self, state, step, shared_key, keys, position):
        t = jnp.floor(spread(shared_key, position) * self.num_timesteps)
        return jnp.minimum(t, self.num_timesteps - 1), jnp.ones_like(position)


def spread(shared_key: Any, position: Float[Array, " batch"]) -> Float[Array, " batch"]:
    """Places spread evenly over [0, 1), all moved by one offset."""
    offset = jax.random.uniform(shared_key, (), position.dtype)
    return (offset + position) % 1


class LossHistory(NamedTuple):
    """The last losses at each t, as a ring: slot ``counts % length`` is replaced next.

    ``probabilities`` are those at the start of ``step``, for all its micro-batches.
    """

    losses: Float[Array, "T length"]
    counts: Int[Array, " T"]
    step: Int[Array, ""]
    probabilities: Float[Array, " T"]


@dataclasses.dataclass(frozen=True)
class LossSecondMoment(Uniform):
    """p(t) ∝ √E[L_t²] over the last losses at each t (Nichol & Dhariwal 2021, eq. 18).

    p(t) is uniform until every t has ``length`` losses, then mixed with ``uniform_share`` of
    uniform. Losses of one step at one t count as older where they come from earlier micro-batches,
    so gradient accumulation makes a slightly different run.
    """

    length: int = 10
    uniform_share: float = 1e-3

    def init(self) -> LossHistory:
        return LossHistory(
            jnp.zeros((self.num_timesteps, self.length)),
            jnp.zeros(self.num_timesteps, jnp.int32),
            jnp.full((), -1, jnp.int32),
            jnp.full(self.num_timesteps, 1 / self.num_timesteps, jnp.float32),
        )

    def probabilities(self, state: LossHistory, step: Int[Array, ""]) -> Float[Array, " T"]:
        """p(t) of a step, summing to 1."""
        root, uniform = jnp.sqrt(jnp.mean(state.losses**2, axis=1)), 1 / self.num_timesteps
        adapted = (1 - self.uniform_share) * root / jnp.sum(root) + self.uniform_share * uniform
        known = jnp.all(state.counts >= self.length) & jnp.any(root > 0)
        latest = jnp.where(known, adapted, uniform)
        return jnp.where(step == state.step, state.probabilities, latest)

    def draw(self, state, step, shared_key, keys, position):
        p = self.probabilities(state, step)
        t = jax.vmap(lambda key: jax.random.categorical(key, jnp.log(p)))(keys)
        return t.astype(position.dtype), 1 / (self.num_timesteps * p[t])

    def update(self, state, step, t, loss):
        t = t.astype(jnp.int32)
        same = t[:, None] == t[None, :]
        earlier = jnp.sum(jnp.tril(same, -1), axis=1)
        later = jnp.sum(jnp.triu(same, 1), axis=1)
        # Only the last `length` losses at one t are written, so that no slot is written twice.
        row = jnp.where(later < self.length, t, self.num_timesteps)
        slot = (state.counts[t] + earlier) % self.length
        return LossHistory(
            losses=state.losses.at[row, slot].set(loss, mode="drop"),
            counts=state.counts.at[t].add(1),
            step=step,
            probabilities=self.probabilities(state, step),
        )


TIME_SAMPLERS = {
    "uniform": Uniform,
    "stratified": Stratified,
    "loss_second_moment": LossSecondMoment,
}
