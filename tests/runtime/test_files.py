"""Files that appear whole or not at all, and the lock of a folder."""

import contextlib
import errno
import fcntl
import os
import pathlib
import stat
import subprocess
import sys
import threading

import pytest
import tiny

from jax_ddpm.errors import UserError
from jax_ddpm.runtime.files import locked, read_json, replacing, sweep


def write(path, content):
    with replacing(path) as file:
        file.write(content)


class TestReplacing:
    def test_puts_what_is_written_in_place(self, tmp_path):
        for content in (b"one", b"other"):
            write(tmp_path / "new" / "file", content)
            assert (tmp_path / "new" / "file").read_bytes() == content
        assert [*(tmp_path / "new").iterdir()] == [tmp_path / "new" / "file"]

    def test_has_the_usual_permissions(self, tmp_path):
        write(tmp_path / "file", b"")
        (tmp_path / "usual").touch()
        assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit])
    def test_an_error_leaves_the_old_file_and_nothing_else(self, tmp_path, error):
        write(tmp_path / "file", b"old")
        with contextlib.suppress(error), replacing(tmp_path / "file") as file:
            file.write(b"new")
            raise error
        assert (tmp_path / "file").read_bytes() == b"old"
        assert [*tmp_path.iterdir()] == [tmp_path / "file"]

    def test_a_full_disk_leaves_the_old_file_and_nothing_else(self, tmp_path):
        write(tmp_path / "file", b"old")
        with tiny.no_file_grows_past(1000), pytest.raises(OSError, match="large"):
            write(tmp_path / "file", bytes(10**6))
        assert (tmp_path / "file").read_bytes() == b"old"
        assert [*tmp_path.iterdir()] == [tmp_path / "file"]

    def test_is_on_disk_before_it_is_in_place(self, tmp_path, monkeypatch):
        done, sync, replace = [], os.fsync, pathlib.Path.replace
        monkeypatch.setattr(
            os, "fsync", lambda file: done.append(os.fstat(file).st_size) or sync(file)
        )
        monkeypatch.setattr(
            pathlib.Path, "replace", lambda *paths: done.append("replace") or replace(*paths)
        )
        write(tmp_path / "file", b"seven b")
        assert done == [7, "replace"]

    def test_several_writers_do_not_meet(self, tmp_path):
        """Each writes a file of its own; the last one stays."""
        path, start = tmp_path / "file", threading.Barrier(4)

        def often(number):
            start.wait()
            for _ in range(25):
                write(path, bytes([number]) * 5000)

        threads = [threading.Thread(target=often, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if path.exists():
                content = path.read_bytes()
                assert content == content[:1] * 5000
        assert [*tmp_path.iterdir()] == [path]

    def test_follows_no_link(self, tmp_path):
        """Neither one in its place, nor one that lies where it would write first."""
        (tmp_path / "target").write_bytes(b"mine")
        (tmp_path / "link").symlink_to(tmp_path / "target")
        write(tmp_path / "link", b"new")
        assert (tmp_path / "link").read_bytes() == b"new"
        (tmp_path / ".file.jax_ddpm-partial").symlink_to(tmp_path / "target")
        write(tmp_path / "file", b"new")
        assert (tmp_path / "file").read_bytes() == b"new"
        assert (tmp_path / "target").read_bytes() == b"mine"

    def test_removes_what_a_killed_writer_of_the_same_file_has_left(self, tmp_path):
        program = f"""
import os, pathlib, signal
from jax_ddpm.runtime.files import replacing
with replacing(pathlib.Path({str(tmp_path / "file")!r})) as file:
    file.write(bytes(10**6))
    os.kill(os.getpid(), signal.SIGKILL)
"""
        assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
        assert len([*tmp_path.iterdir()]) == 1
        write(tmp_path / "file", b"new")
        assert [*tmp_path.iterdir()] == [tmp_path / "file"]

    @pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
    def test_file_systems_without_locks_do_without(self, tmp_path, monkeypatch, number):
        def flock(*_):
            raise OSError(number, "No locks")

        monkeypatch.setattr(fcntl, "flock", flock)
        with replacing(tmp_path / "file") as outer:
            write(tmp_path / "file", b"inner")
            outer.write(b"outer")
        assert (tmp_path / "file").read_bytes() == b"outer"


class TestLock:
    @staticmethod
    def locked(folder):
        return locked(folder, f"--out={folder}", "writes")

    def assert_taken(self, folder):
        line = f"^--out={folder}: another process writes there; wait for it or stop it$"
        with pytest.raises(UserError, match=line), self.locked(folder):
            pass

    def test_is_for_one_at_a_time_and_leaves_nothing(self, tmp_path):
        with self.locked(tmp_path / "new"), self.locked(tmp_path / "another"):
            self.assert_taken(tmp_path / "new")
            self.assert_taken(tmp_path / "new")
        with self.locked(tmp_path / "new"):
            pass
        assert not [*(tmp_path / "new").iterdir()]

    def test_that_a_kill_has_left_is_taken(self, tmp_path):
        program = f"""
import os, pathlib, signal
from jax_ddpm.runtime.files import locked
with locked(pathlib.Path({str(tmp_path)!r}), "", ""):
    os.kill(os.getpid(), signal.SIGKILL)
"""
        assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
        assert (tmp_path / ".lock").exists()
        with self.locked(tmp_path):
            self.assert_taken(tmp_path)
        assert not [*tmp_path.iterdir()]

    def test_that_its_holder_removes_meanwhile_is_not_taken(self, tmp_path, monkeypatch):
        """A lock without a name would keep nobody out."""
        flock, removed = fcntl.flock, []

        def late(file, how):
            if not removed:
                (tmp_path / ".lock").unlink()
                removed.append(True)
            flock(file, how)

        monkeypatch.setattr(fcntl, "flock", late)
        with self.locked(tmp_path):
            assert (tmp_path / ".lock").exists()
            self.assert_taken(tmp_path)

    def test_follows_no_link(self, tmp_path):
        (tmp_path / "target").write_text("mine")
        (tmp_path / ".lock").symlink_to(tmp_path / "target")
        line = r"\.lock cannot be written"
        with pytest.raises(UserError, match=line) as caught, self.locked(tmp_path):
            pass
        assert "\n" not in str(caught.value)
        assert (tmp_path / "target").read_text() == "mine"

    def test_empties_and_removes_no_file_of_others(self, tmp_path):
        (tmp_path / ".lock").write_text("mine")
        with self.locked(tmp_path):
            pass
        assert (tmp_path / ".lock").read_text() == "mine"

    def test_file_systems_without_locks_do_without(self, tmp_path, monkeypatch):
        def flock(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", flock)
        with self.locked(tmp_path):
            pass

    def test_may_be_taken_by_others_later(self, tmp_path):
        """The file of the lock has the usual permissions."""
        (tmp_path / "usual").touch()
        with self.locked(tmp_path):
            mode = (tmp_path / ".lock").stat().st_mode
        assert stat.S_IMODE(mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_sweeping_removes_what_killed_writers_left_alone(tmp_path):
    with replacing(tmp_path / "file"):
        (ours,) = (path.name for path in tmp_path.iterdir())
    for name in (ours, ".mine.partial", "0.partial", ".lock"):
        (tmp_path / name).touch()
    assert sweep(tmp_path) == [".mine.partial", "0.partial", "file"]
    assert ours not in {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a":' * 100_000, "\0", "\udcff"])
def test_what_is_no_json_is_a_value_error(tmp_path, text):
    (tmp_path / "file").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"line 1|nested too deep|can't decode"):
        read_json(tmp_path / "file")
