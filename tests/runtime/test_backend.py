"""What is set before XLA starts."""

import os
import pathlib
import platform
import pwd
import stat
import subprocess
import sys

import jax
import jaxlib
import pytest

from jax_ddpm.errors import UserError
from jax_ddpm.runtime.backend import keep_compiled, require_usual_settings, set_flags

OF_CPU = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
OF_GPU = "--xla_gpu_deterministic_ops=true"


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The folder that compiled programs would go to, given a home."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield lambda: pathlib.Path(jax.config.jax_compilation_cache_dir)
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_are_kept_in_the_users_cache(cache, tmp_path):
    keep_compiled()
    assert cache().parent == tmp_path / "jax_ddpm"


def test_the_cache_is_private_whatever_the_umask(cache, tmp_path):
    """Whoever can write there decides what is run."""
    (tmp_path / "jax_ddpm").mkdir(mode=0o777)
    before = os.umask(0o002)
    try:
        keep_compiled()
    finally:
        os.umask(before)
    for folder in (cache(), cache().parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("obstacle", ["another user", "a file", "no home"])
def test_without_a_cache_of_ones_own_none_is_used(cache, tmp_path, monkeypatch, obstacle):
    before = cache()
    if obstacle == "another user":
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    elif obstacle == "a file":
        (tmp_path / "jax_ddpm").touch()
    else:

        def home():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(pathlib.Path, "home", home)
    with pytest.warns(UserWarning, match="^compiled programs are not kept: "):
        keep_compiled()
    assert cache() == before


def test_another_cpu_has_another_cache(cache, monkeypatch):
    """Programs compiled for its instructions might not run on this one."""
    keep_compiled()
    here = cache()
    read = pathlib.Path.read_text
    monkeypatch.setattr(
        pathlib.Path, "read_text", lambda path, *how: read(path, *how).replace("sse2", "sse3")
    )
    keep_compiled()
    assert cache() != here


def test_without_a_home_nothing_is_kept(cache, monkeypatch):
    """As in a container whose user has no entry in passwd."""

    def nobody(_):
        raise KeyError

    before = cache()
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.warns(UserWarning, match="^compiled programs are not kept: .* home directory"):
        keep_compiled()
    assert cache() == before


def test_a_cache_that_is_set_stays():
    before = jax.config.jax_compilation_cache_dir
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.parametrize("flags", ["", "--xla_dump_to=somewhere"])
def test_flags_join_those_that_are_set(monkeypatch, flags):
    monkeypatch.setenv("XLA_FLAGS", flags)
    set_flags()
    assert os.environ["XLA_FLAGS"].split() == [*flags.split(), OF_CPU]
    set_flags(deterministic=True)
    assert os.environ["XLA_FLAGS"].split() == [*flags.split(), OF_CPU, OF_GPU]


def test_a_choice_of_the_users_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=")
    set_flags()
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_experimental_ynn_fusion_type="


def test_an_xla_that_may_not_know_the_flag_is_spared_it(monkeypatch):
    """It would end the process."""
    monkeypatch.setattr(jaxlib, "__version__", "0.13.0")
    monkeypatch.setenv("XLA_FLAGS", "")
    set_flags()
    assert os.environ["XLA_FLAGS"] == ""


AMBIENT = {
    "jax_enable_x64": (True, lambda: jax.enable_x64(True)),
    "jax_default_prng_impl": ("rbg", lambda: jax.default_prng_impl("rbg")),
    "jax_threefry_partitionable": (False, lambda: jax.threefry_partitionable(False)),
    "jax_numpy_dtype_promotion": ("strict", lambda: jax.numpy_dtype_promotion("strict")),
    "jax_disable_jit": (True, jax.disable_jit),
}


@pytest.mark.parametrize("name", AMBIENT)
def test_settings_that_results_depend_on_are_refused(name):
    require_usual_settings()
    value, setting = AMBIENT[name]
    with setting(), pytest.raises(UserError, match=f"^{name.upper()}={value}: ") as caught:
        require_usual_settings()
    assert "\n" not in str(caught.value)
    assert f"jax.config.update({name!r}, " in str(caught.value)


def test_an_offset_of_every_seed_is_refused():
    jax.config.update("jax_random_seed_offset", 1)
    try:
        with pytest.raises(UserError, match=r"^JAX_RANDOM_SEED_OFFSET=1: .*must be 0"):
            require_usual_settings()
    finally:
        jax.config.update("jax_random_seed_offset", 0)


_FAULTS = """
import resource, sys
from jax_ddpm.runtime.backend import keep_memory
if sys.argv[1] == "kept":
    keep_memory()
import jax, jax.numpy as jnp

@jax.jit
def program(x):
    return x @ x.T @ x  # 4096 × 8 × 4096 × 8, with 64 MB between

x = jnp.ones((4096, 8))
faults = []
for _ in range(20):  # at first the heap may still grow
    program(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-3])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries have no such choice")
def test_a_programs_memory_is_kept_for_its_next_call():
    """The system maps a page (of 4 kB, mostly) at the first touch; 64 MB are 16,384 of them."""

    def faults(memory: str) -> int:
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", _FAULTS, memory]
        return int(subprocess.check_output(command, env=environment, text=True))

    assert faults("kept") < faults("given back") / 20
