"""The official archives hold 176 MB; these are small ones in the same layout."""

import hashlib
import io
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest

from jax_ddpm.data import cifar10 as module
from jax_ddpm.data.cifar10 import cifar10
from jax_ddpm.data.source import image_spec
from jax_ddpm.errors import UserError

PYTHON, BINARY = "cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"
PARTS = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
RNG = np.random.default_rng(0)
IMAGES = {name: RNG.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8) for name in PARTS}
LABELS = {name: RNG.permutation(10)[:3] for name in PARTS}
LABELS["data_batch_4"][0] = 9
# Of batches.meta in the archive.
CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
)  # fmt: skip


def rows(name):
    """Each image as 1,024 red, 1,024 green and 1,024 blue bytes."""
    return np.array([[image[..., c].ravel() for c in range(3)] for image in IMAGES[name]])


def string(content):
    """A ``str`` of Python 2, for which Python 3 has no pickle opcode of its own."""
    return b"T" + struct.pack("<i", len(content)) + content


def python_member(name):
    """The pickle of Python 2 and its NumPy: {'data': uint8 [n, 3072], 'labels': list}."""
    content = rows(name).tobytes()
    dtype = b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b")
    array += b"\x87R(K\x01K\x03M\x00\x0c\x86" + dtype + b"\x89" + string(content) + b"tb"
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in LABELS[name].tolist()) + b"e"
    return b"\x80\x02}(" + string(b"data") + array + string(b"labels") + labels + b"u."


def binary_member(name):
    return np.column_stack([LABELS[name], rows(name).reshape(3, 3072)]).astype(np.uint8).tobytes()


def write(path, members):
    with tarfile.open(path, "w:gz") as archive:
        folder = tarfile.TarInfo("cifar-10-batches")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def trust(monkeypatch):
    """Puts a file's checksum in the place of the official one."""

    def trust(path, official):
        checksum = hashlib.md5(path.read_bytes()).hexdigest()
        monkeypatch.setitem(module._READERS, checksum, module._READERS[official])

    return trust


OFFICIAL = {
    PYTHON: "c58f30108f718f92721af3b95e74349a",
    BINARY: "c32a1d4ab5d03f1284b67883e8d87530",
}


@pytest.fixture
def archive(tmp_path, trust):
    def archive(name):
        path = tmp_path / name
        if name == PYTHON:
            members = {f"cifar-10-batches-py/{part}": python_member(part) for part in PARTS}
        else:
            members = {f"cifar-10-batches-bin/{part}.bin": binary_member(part) for part in PARTS}
        # The official archive has its batches in no order, among other files.
        write(path, {"readme.html": b"", **dict(reversed(members.items()))})
        trust(path, OFFICIAL[name])
        return path

    return archive


@pytest.mark.filterwarnings("ignore:cifar10. of 10 classes")
@pytest.mark.parametrize("name", [PYTHON, BINARY])
@pytest.mark.parametrize("by", ["file", "folder"])
def test_both_archives_hold_the_same_set(archive, name, by):
    path = archive(name)
    source = cifar10(str(path if by == "file" else path.parent))
    sizes = {"train": 15, "heldout": 3}
    assert source.spec == image_spec((32, 32, 3), 256, 10, sizes, "cifar10", CLASSES)
    train, heldout = source.batch("train", np.arange(15)), source.batch("heldout", np.arange(3))
    np.testing.assert_array_equal(train["image"], np.concatenate([IMAGES[p] for p in PARTS[:5]]))
    np.testing.assert_array_equal(train["label"], np.concatenate([LABELS[p] for p in PARTS[:5]]))
    np.testing.assert_array_equal(heldout["image"], IMAGES["test_batch"])
    np.testing.assert_array_equal(heldout["label"], LABELS["test_batch"])
    assert (train["image"].dtype, train["label"].dtype) == (np.uint8, np.int32)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("made_by_a_pickle",)


def test_a_pickle_can_make_nothing_but_arrays(tmp_path, trust, monkeypatch):
    monkeypatch.chdir(tmp_path)
    member = pickle.dumps({b"data": Malicious(), b"labels": []}, protocol=2)
    write(tmp_path / PYTHON, {f"cifar-10-batches-py/{part}": member for part in PARTS})
    trust(tmp_path / PYTHON, OFFICIAL[PYTHON])
    with pytest.raises(pickle.UnpicklingError, match="no part of an array"):
        cifar10(PYTHON)
    assert [file.name for file in tmp_path.iterdir()] == [PYTHON]


def the_error(path):
    with pytest.raises(UserError) as caught:
        cifar10(str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert "https://www.cs.toronto.edu/~kriz/cifar.html" in message
    return message


def test_an_archive_that_is_not_the_official_one_is_refused(archive):
    path = archive(PYTHON)
    path.write_bytes(path.read_bytes()[:-1])
    message = the_error(path)
    assert str(path) in message
    assert hashlib.md5(path.read_bytes()).hexdigest() in message


def test_a_missing_archive_is_named(tmp_path):
    assert PYTHON in the_error(tmp_path)
    assert "nowhere" in the_error(tmp_path / "nowhere")
