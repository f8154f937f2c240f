"""A run's folder: made, kept from other jobs while one trains into it, and nobody else's."""

import errno
import fcntl
import pathlib
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
        with claimed(tmp_path):
            save_identity(tmp_path, tiny.config(seed=5), tiny.spec())
            assert load_identity(tmp_path)[0].seed == 5


WRITTEN = ["config.json", "data.json", "frozen.json", "metrics.jsonl", "samples", "tensorboard"]


class TestWhatIsNotOurs:
    """Training would overwrite it."""

    @staticmethod
    def refuses(workdir):
        before = sorted(workdir.rglob("*"))
        with pytest.raises(UserError, match=f"^--workdir={workdir} ") as caught, claimed(workdir):
            pytest.fail("claimed")
        assert sorted(workdir.rglob("*")) == before
        assert "\n" not in str(caught.value)
        return str(caught.value)

    @pytest.mark.parametrize("name", WRITTEN)
    @pytest.mark.parametrize("beside", ["nothing", "checkpoints", "checkpoints of another"])
    def test_is_refused(self, tmp_path, name, beside):
        (tmp_path / name).mkdir() if "." not in name else (tmp_path / name).write_text('{"a": 1}')
        if beside != "nothing":
            (tmp_path / "checkpoints").mkdir()
        if beside == "checkpoints of another":
            (tmp_path / "checkpoints" / "model.pt").touch()
        assert name in self.refuses(tmp_path)

    @pytest.mark.parametrize("text", ["", "[]", "7", "null", '{"model": {}}', "[" * 100_000])
    def test_is_a_config_of_another_program(self, tmp_path, text):
        (tmp_path / "config.json").write_text(text)
        (tmp_path / "checkpoints").mkdir()
        assert "config.json of something else" in self.refuses(tmp_path)

    def test_are_checkpoints_of_another_program(self, tmp_path):
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "last.orbax-checkpoint-tmp").touch()
        assert "checkpoints of something else" in self.refuses(tmp_path)

    def test_a_run_without_its_checkpoints_is_refused(self, tmp_path):
        save_identity(tmp_path, tiny.config(), tiny.spec())
        (tmp_path / "metrics.jsonl").write_text("{}")
        line = self.refuses(tmp_path)
        assert "config.json, data.json, metrics.jsonl, but its checkpoints are gone; bring" in line
        (tmp_path / "checkpoints").symlink_to(tmp_path / "not mounted")
        assert "its checkpoints are gone" in self.refuses(tmp_path)
        (tmp_path / "data.json").rename(tmp_path / "noted")
        assert "its checkpoints are gone" in self.refuses(tmp_path)

    def test_so_is_what_has_only_its_data_noted(self, tmp_path):
        save_identity(tmp_path, tiny.config(), tiny.spec())
        (tmp_path / "config.json").unlink()
        assert "data.json of something else" in self.refuses(tmp_path)

    def test_so_is_one_whose_every_checkpoint_was_moved(self, tmp_path):
        """The log has come so far that there has been one; its last line was cut by a kill."""
        (tmp_path / "checkpoints").mkdir()
        save_identity(tmp_path, tiny.config(), tiny.spec())
        every = tiny.config().training.checkpoint_every
        log = tmp_path / "metrics.jsonl"
        log.write_text(f'{{"step": {2 * every + 1}, "loss": 1}}\n{{"ste')
        assert "its checkpoints are gone" in self.refuses(tmp_path)
        log.write_text(f'{{"step": {2 * every}, "loss": 1}}\n{{"ste')
        with claimed(tmp_path):
            pass

    @pytest.mark.parametrize("make", [pathlib.Path.touch, lambda path: path.symlink_to(path)])
    @pytest.mark.parametrize("begun", [False, True])
    def test_so_is_one_whose_checkpoints_cannot_be_read(self, tmp_path, make, begun):
        if begun:
            save_identity(tmp_path, tiny.config(), tiny.spec())
        make(tmp_path / "checkpoints")
        with pytest.raises(UserError, match="its checkpoints cannot be read"), claimed(tmp_path):
            pytest.fail("claimed")

    @pytest.mark.parametrize("killed_after", range(5))
    def test_a_run_killed_before_its_first_checkpoint_goes_on(self, tmp_path, killed_after):
        """It writes in this order."""
        (tmp_path / "checkpoints").mkdir()
        if killed_after:
            save_identity(tmp_path, tiny.config(), tiny.spec())
        if killed_after == 1:
            (tmp_path / "data.json").unlink()
        if killed_after > 2:
            (tmp_path / "metrics.jsonl").touch()
        if killed_after > 3:
            (tmp_path / "tensorboard").mkdir()
        with claimed(tmp_path):
            pass

    def test_anything_else_may_lie_there(self, tmp_path):
        (tmp_path / "notes.txt").touch()
        (tmp_path / "evaluation").mkdir()
        with claimed(tmp_path):
            pass
