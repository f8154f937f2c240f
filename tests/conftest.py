"""Strict settings for every test: shapes checked, rank promotion an error, several devices."""

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Every annotated shape and dtype of the package is checked at each call.
install_import_hook("jax_ddpm", "beartype.beartype")
