"""The config of an experiment: every field, its default, and what it must be."""

from jax_ddpm.config.defaults import default

__all__ = ["default"]
