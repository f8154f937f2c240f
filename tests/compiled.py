"""Compiled programs, kept from one run of the tests to the next and shared by all their processes.

JAX writes an entry in place, so that others can read half of it, and a killed process leaves half.
Where this module was imported entries appear whole. Where it was not, JAX only reads.
"""

import os
import pathlib

import jax
from jax._src.lru_cache import LRUCache

_LARGEST = 3 * 2**30  # bytes, of which one run fills about a fifth


def keep(folder: pathlib.Path) -> None:
    """In this process and those that it starts."""
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "inf",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def prune(folder: pathlib.Path) -> None:
    """Removes what was not used for longest. No other process may be using the folder."""
    used = [(entry.stat(), entry) for entry in folder.glob("*")]
    left = sum(stat.st_size for stat, _ in used) - _LARGEST
    for stat, entry in sorted(used, key=lambda pair: pair[0].st_mtime):
        if left <= 0:
            return
        entry.unlink()
        left -= stat.st_size


def _put(self, key, value):
    final = pathlib.Path(self.path) / f"{key}-cache"
    part = final.with_name(f"{key}-{os.getpid()}")
    part.write_bytes(value)
    part.replace(final)


def _get(self, key):
    entry = pathlib.Path(self.path) / f"{key}-cache"
    try:
        value = entry.read_bytes()
        os.utime(entry)
    except FileNotFoundError:
        return None
    return value


LRUCache.put, LRUCache.get = _put, _get
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
