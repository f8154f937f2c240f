"""Denoising diffusion probabilistic models (Ho et al. 2020) in JAX and Flax.

Importing this package loads nothing heavy; import the room you need:
``jax_ddpm.diffusion`` (the mathematics), ``jax_ddpm.models`` (networks),
``jax_ddpm.training``, ``jax_ddpm.generate``; or ``load`` a trained model and ``sample`` from it.
"""

import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax_ddpm.inference.trained import Trained

__version__ = "0.1.0"


def load(
    workdir: str | pathlib.Path, step: int | None = None, raw: bool = False, **sampling: Any
) -> "Trained":
    """The model that a run trained; see ``jax_ddpm.inference.trained.load``."""
    from jax_ddpm.inference import trained

    return trained.load(workdir, step, raw, **sampling)
