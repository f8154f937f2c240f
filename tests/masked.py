"""A chain that masks: bits as states 0 and 1, and a third for what is hidden (Austin et al. 2021).

At t of T each bit is hidden with probability t/T. A step back shows each hidden bit with
probability 1/t, drawn from the model's p(x_0 | x_t).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_ddpm.diffusion.likelihood import BoundTerms, mean_over_dims
from jax_ddpm.diffusion.process import expand, fold_in
from jax_ddpm.diffusion.samplers.scan import Sampler, no_history
from jax_ddpm.diffusion.samplers.table import Method

MASK = 2


class UnmaskingNode(NamedTuple):
    time: np.ndarray
    shown: np.ndarray
    last: np.ndarray


def unmasking(family):
    """The reverse chain, whose denoiser gives log p(x_0 | x_t) of both states of each bit."""
    t = np.arange(family.num_timesteps, 0, -1)

    def step(denoiser, x, node, carry, keys):
        def draw(key, log_p):
            show_key, state_key = jax.random.split(key)
            show = jax.random.bernoulli(show_key, node.shown, log_p.shape[:-1])
            return show | node.last, jax.random.categorical(state_key, log_p)

        log_p = denoiser(x, node.time)
        show, state = jax.vmap(draw)(keys, log_p)
        return jnp.where((x == MASK) & show, state, x), carry, log_p

    nodes = UnmaskingNode(t, 1 / t, t == 1)
    return Sampler(nodes, no_history, step, family.prior, show=lambda log_p: log_p.argmax(axis=-1))


@dataclasses.dataclass(frozen=True)
class Masked:
    num_timesteps: int
    samplers = {"unmasking": Method(unmasking)}  # noqa: RUF012

    def prior(self, keys, shape):
        return jnp.full((len(keys), *shape), MASK)

    def corrupt(self, keys, x0, t):
        places = jax.vmap(lambda key: jax.random.uniform(key, x0.shape[1:]))(keys)
        hidden = places < expand(t / self.num_timesteps, x0)
        return jnp.where(hidden, MASK, x0), hidden

    def bound(self, denoiser, x0, keys, conditioning):
        def term(t):
            times = jnp.full(len(x0), t, jnp.float32)
            xt, hidden = self.corrupt(fold_in(keys, t), x0, times)
            log_p = denoiser(xt, times, conditioning)
            of_x0 = jnp.take_along_axis(log_p, x0[..., None], axis=-1)[..., 0]
            wrong = hidden & (log_p.argmax(axis=-1) != x0)
            return mean_over_dims(jnp.where(hidden, -of_x0, 0)) / times, mean_over_dims(
                wrong.astype(float)
            )

        nats, errors = jax.lax.map(term, jnp.arange(1, self.num_timesteps + 1))
        return BoundTerms(nats.T, errors.T, jnp.zeros(len(x0)))


@dataclasses.dataclass(frozen=True)
class TwinBits:
    """The exact denoiser of two equal bits, both 1 with probability ``p``."""

    p: float

    @property
    def entropy(self):
        """In nats."""
        return -self.p * np.log(self.p) - (1 - self.p) * np.log(1 - self.p)

    def draw(self, key, number):
        bit = jax.random.bernoulli(key, self.p, (number, 1)).astype(jnp.int32)
        return jnp.tile(bit, 2)

    def __call__(self, xt, t, conditioning):
        twin = xt[:, ::-1, None]
        unknown = jnp.log(jnp.array([[[1 - self.p, self.p]]], jnp.float32))
        told = jnp.where(twin == jnp.arange(2)[None, None], 0.0, -jnp.inf)
        return jnp.where(twin == MASK, unknown, told)
