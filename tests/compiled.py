"""Compiled programs, kept from one run of the tests to the next and shared by all their processes.

JAX writes an entry in place, so that others can read half of it, and a killed process leaves half.
Where this module was imported entries appear whole. Where it was not, JAX only reads.
"""

import os
import pathlib

import jax
from jax._src.lru_cache import LRUCache

_LARGEST = 2**30  # bytes, a multiple of what one run fills


def keep(folder: pathlib.Path) -> None:
    """Keeps programs in this process and those that it starts."""
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "inf",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def prune(folder: pathlib.Path) -> None:
    """Removes what was not used for longest."""
    used = [(entry.stat(), entry) for entry in folder.glob("*")]
    left = sum(stat.st_size for stat, _ in used) - _LARGEST
    for stat, entry in sorted(used, key=lambda pair: pair[0].st_mtime):
        if left <= 0:
            return
        entry.unlink(missing_ok=True)
        left -= stat.st_size


def _put(self, key, value):
    entry = pathlib.Path(self.path) / f"{key}-cache"
    part = entry.with_suffix(f".{os.getpid()}")
    part.write_bytes(value)
    part.replace(entry)


def _get(self, key):
    entry = pathlib.Path(self.path) / f"{key}-cache"
    try:
        os.utime(entry)
        return entry.read_bytes()
    except FileNotFoundError:
        return None


LRUCache.put, LRUCache.get = _put, _get
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
