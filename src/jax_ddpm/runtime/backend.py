"""XLA's settings before it starts, and the memory that it uses on a CPU."""

import ctypes
import hashlib
import os
import pathlib
import platform
import warnings

from jax_ddpm.errors import UserError

_FASTER_ON_CPU = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"

# Settings of JAX that decide what is computed, or whether it can be.
_DECIDING = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_numpy_dtype_promotion": "standard",
    "jax_disable_jit": False,
}

# glibc's mallopt parameters (malloc.h), with their values for "never", "no limit" and "none".
_M_MMAP_MAX, _NEVER = -4, 0
_M_TRIM_THRESHOLD, _UNLIMITED = -1, -1
_M_MXFAST, _NONE = 1, 0


def set_flags(deterministic: bool = False) -> None:
    """Sets XLA's flags; call it before anything touches a device.

    ``deterministic`` limits GPUs to kernels that give the same bits each time; CPUs and TPUs do so
    anyway.

    Convolutions on a CPU stay with XLA's older library. The newer one makes a train step of
    CIFAR-10 (batch 16) take 1.4 times as long, and one of digits 1.1 times, by jaxlib 0.10.2 on 2
    cores of an Intel Xeon, 2026-11-25:
    ``python benchmarks/train_step.py --shape=cifar10 --batch_size 16`` with and without
    ``XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=+individual_convolution``.
    """
    import jaxlib

    flags = os.environ.get("XLA_FLAGS", "").split()
    known = tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 13)  # later ones may refuse it
    if known and not any("ynn_fusion_type" in flag for flag in flags):
        flags.append(_FASTER_ON_CPU)
    if deterministic and _DETERMINISTIC not in flags:
        flags.append(_DETERMINISTIC)
    os.environ["XLA_FLAGS"] = " ".join(flags)


def require_usual_settings() -> None:
    """Refuses settings of JAX, from the environment or the caller, that would change results.

    Raises:
      UserError: naming the first, and what it must be.
    """
    import jax

    for name, usual in _DECIDING.items():
        held = getattr(jax.config, name)
        if (held := getattr(held, "value", held)) != usual:
            raise UserError(
                f"{name.upper()}={held}: results depend on it, so it must be {usual}; unset it, or "
                f"jax.config.update({name!r}, {usual!r})"
            )


def keep_memory() -> None:
    """Keeps the host's memory from one step to the next; call it before XLA starts.

    XLA's CPU backend asks for all temporaries of a program at every call, and frees them after it.
    glibc by default takes that much from the system each time, which maps and clears it page by
    page as it is touched: a seventh of CIFAR-10's train step (batch 16, 2 cores). glibc can keep it
    only in the heap of the main thread, so a CPU's programs run in the thread that calls them.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, _NEVER)
        mallopt(_M_TRIM_THRESHOLD, _UNLIMITED)
        # Small freed pieces are merged at once. glibc would set them aside and go through all of
        # them whenever a large one is freed, which happens often while XLA loads a program.
        mallopt(_M_MXFAST, _NONE)


def keep_compiled() -> None:
    """Keeps compiled programs, so that the next start of the same job compiles nothing.

    They lie in ``~/.cache/jax_ddpm``, or in ``JAX_COMPILATION_CACHE_DIR``. The former is made
    private, because these programs are run. Where it cannot be, a warning says so, and none are
    kept.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    try:
        jax.config.update("jax_compilation_cache_dir", str(private_cache(cpu_kind())))
    except (OSError, RuntimeError) as error:  # no home, or not ours
        warnings.warn(f"compiled programs are not kept: {error}", stacklevel=2)


def private_cache(name: str) -> pathlib.Path:
    """A folder for what may be made anew, in ``~/.cache/jax_ddpm`` or ``XDG_CACHE_HOME``.

    Raises:
      OSError or RuntimeError: where there is no home, or the folder cannot be ours alone.
    """
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    ours = root / "jax_ddpm"
    for folder in (ours, ours / name):
        folder.mkdir(parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise PermissionError(f"{folder} belongs to another user")
        folder.chmod(0o700)
    return folder


def cpu_kind() -> str:
    """Names the folder of a cache, because hosts of several kinds may share a home."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = (
        cpuinfo.read_text("utf-8", "replace").splitlines()
        if cpuinfo.exists()
        else [platform.processor()]
    )
    kind = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    digest = hashlib.sha256("".join(kind).encode()).hexdigest()[:8]
    return f"{platform.machine()}-{digest}"
