"""The hashes of files, with and without what is kept of them."""

import hashlib
import os
import pathlib

import pytest

from jax_ddpm.data import contents
from jax_ddpm.data.contents import file_hashes
from jax_ddpm.errors import UserError

FILES = ["a", "b/c", "b/\udcff"]  # the last is no UTF-8


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data" / "b").mkdir(parents=True)
    for number, name in enumerate(FILES):
        (tmp_path / "data" / name).write_bytes(bytes([number] * 1000))
    return tmp_path / "data"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """All is kept, at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(contents, "_WORTH_KEEPING", 0)
    monkeypatch.setattr(contents, "_SETTLED", -(10**12))
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch):
    """The names of the files that are read."""
    names, read = [], contents._sha256
    monkeypatch.setattr(contents, "_sha256", lambda path: names.append(path.name) or read(path))
    return names


def expected(root):
    return {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in FILES}


def test_are_those_of_the_bytes(root):
    assert file_hashes(root, FILES) == expected(root)


def test_only_what_has_changed_is_read_again(root, cache, reads):
    file_hashes(root, FILES)
    del reads[:]
    assert file_hashes(root, FILES) == expected(root)
    assert reads == []
    before = (root / "a").stat()
    (root / "a").write_bytes(bytes([9] * 1000))
    os.utime(root / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_hashes(root, FILES) == expected(root)
    assert reads == ["a"]


def test_what_may_still_change_within_its_times_is_not_kept(root, cache, reads, monkeypatch):
    monkeypatch.setattr(contents, "_SETTLED", 10**12)
    for _ in range(2):
        file_hashes(root, FILES)
    assert len(reads) == 2 * len(FILES)


def test_each_folder_has_its_own(root, cache, tmp_path):
    other = root.with_name("other")
    os.renames(root, other)
    (root / "b").mkdir(parents=True)
    for name in FILES:
        (root / name).write_bytes((other / name).read_bytes()[::-1] + b"!")
    for _ in range(2):
        assert file_hashes(root, FILES) == expected(root)
        assert file_hashes(other, FILES) == expected(other)


def unwritable(cache, monkeypatch):
    cache.write_text("no folder")


def homeless(cache, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)


def damaged(cache, monkeypatch):
    for place in pathlib.Path(cache).rglob("*.json"):
        place.write_text('{"a": [1, 2')


@pytest.mark.parametrize("spoil", [unwritable, homeless, damaged])
def test_without_a_place_all_are_read(root, cache, monkeypatch, spoil, reads):
    if spoil is damaged:
        file_hashes(root, FILES)
        del reads[:]
    spoil(cache, monkeypatch)
    assert file_hashes(root, FILES) == expected(root)
    assert len(reads) == len(FILES)


def test_few_bytes_are_not_kept(root, cache, monkeypatch):
    monkeypatch.setattr(contents, "_WORTH_KEEPING", 2**26)
    file_hashes(root, FILES)
    assert not cache.exists()


def test_what_cannot_be_read_is_named(root):
    (root / "a").unlink()
    with pytest.raises(UserError, match=f"^{root}/a: cannot be read .*; restore it$"):
        file_hashes(root, FILES)
