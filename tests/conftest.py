"""Strict settings for every test: rank promotion an error, several devices."""

import pathlib

import compiled
import jax

COMPILED = pathlib.Path(__file__).parents[1] / ".compiled_cache"

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    from jax_ddpm.runtime.backend import cpu_kind  # not before the types' import hook

    folder = COMPILED / cpu_kind()
    if not hasattr(config, "workerinput"):
        compiled.prune(folder)
    compiled.keep(folder)
