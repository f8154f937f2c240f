"""A run's folder: made, and kept from other jobs while one trains into it."""

import errno
import fcntl
import subprocess
import sys

import pytest
import tiny

from jax_ddpm.errors import UserError
from jax_ddpm.runs.identity import load_identity, save_identity
from jax_ddpm.runs.workdir import claimed


class TestClaim:
    def claim(self, workdir):
        with claimed(workdir):
            pass

    def assert_taken(self, workdir):
        with pytest.raises(UserError, match=f"^--workdir={workdir}: another process") as caught:
            self.claim(workdir)
        assert "\n" not in str(caught.value)

    def test_makes_the_folder(self, tmp_path):
        self.claim(tmp_path / "new" / "run")
        assert (tmp_path / "new" / "run").is_dir()

    def test_a_workdir_that_cannot_be_written_is_one_line_naming_it(self, tmp_path):
        (tmp_path / "file").touch()
        for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
            with pytest.raises(UserError, match=f"--workdir={workdir}: .*written") as caught:
                self.claim(workdir)
            assert "\n" not in str(caught.value)

    def test_is_for_one_at_a_time(self, tmp_path):
        with claimed(tmp_path), claimed(tmp_path / "another"):
            self.assert_taken(tmp_path)
            self.assert_taken(tmp_path)
        self.claim(tmp_path)

    def test_ends_with_an_error(self, tmp_path):
        with pytest.raises(ZeroDivisionError), claimed(tmp_path):
            raise ZeroDivisionError
        self.claim(tmp_path)

    def test_ends_with_the_process(self, tmp_path):
        """However it ends."""
        program = f"""
import pathlib, sys
from jax_ddpm.runs.workdir import claimed
with claimed(pathlib.Path({str(tmp_path)!r})):
    print("claimed", flush=True)
    sys.stdin.read()
"""
        pipe = subprocess.PIPE
        with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe) as child:
            assert child.stdout.readline() == b"claimed\n"
            self.assert_taken(tmp_path)
            child.kill()
        self.claim(tmp_path)

    def test_file_systems_without_locks_do_without(self, tmp_path, monkeypatch):
        def flock(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", flock)
        self.claim(tmp_path)

    def test_reading_needs_none(self, tmp_path):
        save_identity(tmp_path, tiny.config(seed=5), tiny.spec())
        with claimed(tmp_path):
            assert load_identity(tmp_path)[0].seed == 5
