"""Strict settings for every test: shapes checked, rank promotion an error, several devices."""

import os
import tempfile

# What one test has compiled the others load, also those in processes of their own.
_COMPILED = tempfile.TemporaryDirectory()
os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": _COMPILED.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}

import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Every annotated shape and dtype of the package is checked at each call.
install_import_hook("jax_ddpm", "beartype.beartype")
