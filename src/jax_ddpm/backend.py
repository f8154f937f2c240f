"""What XLA is told before it starts."""

import hashlib
import os
import pathlib
import platform


def prepare(deterministic: bool) -> None:
    """Sets the flags of the back end; to be called before anything touches a device.

    Compiled programs are kept in ``~/.cache/jax_ddpm``, or where ``JAX_COMPILATION_CACHE_DIR``
    says, so that the next start of the same job compiles nothing. ``deterministic`` has GPUs use
    only kernels that give the same bits each time; CPUs and TPUs do so anyway.
    """
    if deterministic:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        import jax

        jax.config.update("jax_compilation_cache_dir", str(_cache()))


def _cache() -> pathlib.Path:
    """One folder for each kind of CPU: a home may be shared by hosts of several kinds."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    kind = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    digest = hashlib.sha256("".join(kind).encode()).hexdigest()[:8]
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return root / "jax_ddpm" / f"{platform.machine()}-{digest}"
