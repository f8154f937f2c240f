"""What is set before XLA starts."""

import os
import pathlib

import jax
import pytest

from jax_ddpm.backend import prepare


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The folder that compiled programs would go to, given a home."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield lambda: pathlib.Path(jax.config.jax_compilation_cache_dir)
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_are_kept_in_the_users_cache(cache, tmp_path):
    prepare(deterministic=False)
    assert cache().parent == tmp_path / "jax_ddpm"


def test_another_cpu_has_another_cache(cache, monkeypatch):
    """Programs compiled for its instructions might not run on this one."""
    prepare(deterministic=False)
    here = cache()
    read = pathlib.Path.read_text
    monkeypatch.setattr(pathlib.Path, "read_text", lambda path: read(path).replace("sse2", "sse3"))
    prepare(deterministic=False)
    assert cache() != here


def test_a_cache_that_is_set_stays(monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(before))
    prepare(deterministic=False)
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.parametrize("flags", ["", "--xla_dump_to=somewhere"])
def test_determinism_joins_the_flags_that_are_set(monkeypatch, flags):
    monkeypatch.setenv("XLA_FLAGS", flags)
    prepare(deterministic=False)
    assert os.environ["XLA_FLAGS"] == flags
    prepare(deterministic=True)
    assert os.environ["XLA_FLAGS"].split() == [*flags.split(), "--xla_gpu_deterministic_ops=true"]
