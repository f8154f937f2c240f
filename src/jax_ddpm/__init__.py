"""Denoising diffusion probabilistic models (Ho et al. 2020) in JAX and Flax.

Importing this package loads nothing heavy. ``train`` trains, ``load`` reads a run, to sample, edit
and measure it: see ``jax_ddpm.api.run``. To build on it, import the room you need:
``jax_ddpm.diffusion`` (the mathematics), ``jax_ddpm.models`` (networks), ``jax_ddpm.training``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax_ddpm.api.run import load, train

__all__ = ["load", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jax_ddpm.api import run

    return getattr(run, name)
