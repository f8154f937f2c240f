"""Guidance: denoisers made of denoisers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_ddpm.diffusion.denoiser import Conditioning
from jax_ddpm.diffusion.parameterisation import Prediction


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassifierFreeGuidance:
    """ε̃ = ε(x_t) + scale·(ε(x_t | c) - ε(x_t)) (Ho & Salimans 2022, whose w is scale - 1).

    Scale 0 is exactly the unconditional model and 1 exactly the conditional one, in one pass of
    the network; any other scale takes one pass of twice the batch. x_0 moves along with ε, so that
    both still agree with x_t; a learned variance is the conditional model's. ``conditioning`` holds
    no drop masks of its own: they say which half of the batch is unconditional.
    """

    denoiser: Any
    scale: float = dataclasses.field(metadata={"static": True})

    def __call__(
        self,
        xt: Float[Array, "batch *shape"],
        t: Float[Array, ""] | Float[Array, " batch"],
        conditioning: Conditioning,
    ) -> Prediction:
        if self.scale == 1:
            return self.denoiser(xt, t, conditioning)
        if self.scale == 0:
            return self.denoiser(xt, t, {})

        def twice(x: Array) -> Array:
            return jnp.concatenate([x, x])

        drop = jnp.repeat(jnp.array([False, True]), len(xt))
        both = self.denoiser(
            twice(xt),
            twice(t) if t.ndim else t,
            jax.tree.map(twice, conditioning) | {f"{name}_drop": drop for name in conditioning},
        )
        conditional = jax.tree.map(lambda x: x[: len(xt)], both)
        unconditional = jax.tree.map(lambda x: x[len(xt) :], both)

        def extrapolate(u: Array, c: Array) -> Array:
            return u + self.scale * (c - u)

        return conditional._replace(
            x0=extrapolate(unconditional.x0, conditional.x0),
            eps=extrapolate(unconditional.eps, conditional.eps),
        )
