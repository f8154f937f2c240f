"""Families of noise: what is lost of the data, and the ways back.

Training loops, the sampling scan and measurements see no more of a family than this contract. A
Gaussian is one, of any ``Process``; chains over a few states and binomial counts are others, with
losses of their own.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Shaped

from jax_ddpm.diffusion.chain import chain_of
from jax_ddpm.diffusion.denoiser import Conditioning, Denoiser
from jax_ddpm.diffusion.likelihood import BoundTerms, ModelVariance, variational_bound
from jax_ddpm.diffusion.process import Process, corrupt, prior
from jax_ddpm.diffusion.samplers.table import SAMPLERS, Method


@runtime_checkable
class Family(Protocol):
    """A forward process q(x_t | x_0) with its reverse."""

    @property
    def samplers(self) -> Mapping[str, Method]:
        """Its methods by their names, each made on a path of this family."""
        ...

    def prior(self, keys: Any, shape: tuple[int, ...]) -> Shaped[Array, "batch *shape"]:
        """What is left at the end: an example of ``shape`` for each key."""
        ...

    def corrupt(
        self, keys: Any, x0: Shaped[Array, "batch *shape"], t: Float[Array, " batch"]
    ) -> tuple[Shaped[Array, "batch *shape"], Any]:
        """x_t ~ q(x_t | x_0), and what was drawn, for losses; each example's by its own key."""
        ...

    def bound(
        self,
        denoiser: Callable,
        x0: Shaped[Array, "batch *shape"],
        keys: Any,
        conditioning: Conditioning,
    ) -> BoundTerms:
        """An unbiased estimate of the bound on -log p(x_0); each example's by its own key.

        Raises:
          UserError: where there is none.
        """
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian:
    """x_t = α·x_0 + σ·ε (a ``Family``).

    Attributes:
      process: α and σ.
      variance: of the reverse steps, for the bound.
      num_levels: of the data, for the bound's discrete decoder.
    """

    process: Process
    variance: ModelVariance = "fixedsmall"
    num_levels: int = 256
    samplers = SAMPLERS

    def prior(self, keys: Any, shape: tuple[int, ...]) -> Float[Array, "batch *shape"]:
        """N(0, prior_std²·I) at the noisiest time."""
        return prior(self.process, self.process.time_range[1], keys, shape)

    def corrupt(
        self, keys: Any, x0: Float[Array, "batch *shape"], t: Float[Array, " batch"]
    ) -> tuple[Float[Array, "batch *shape"], Float[Array, "batch *shape"]]:
        """x_t and its ε."""
        return corrupt(self.process, keys, x0, t)

    def bound(
        self,
        denoiser: Denoiser,
        x0: Float[Array, "batch *shape"],
        keys: Any,
        conditioning: Conditioning,
    ) -> BoundTerms:
        """See ``variational_bound``, which only a chain has."""
        return variational_bound(
            chain_of(self.process),
            denoiser,
            x0,
            keys,
            conditioning,
            self.variance,
            self.num_levels,
        )
