"""Denoising diffusion probabilistic models (Ho et al. 2020) in JAX and Flax.

Importing this package loads nothing heavy; import the room you need:
``jax_ddpm.diffusion`` (the mathematics), ``jax_ddpm.models`` (networks),
``jax_ddpm.training``, ``jax_ddpm.generate``.
"""

__version__ = "0.1.0"
