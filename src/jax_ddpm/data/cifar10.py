"""CIFAR-10 from its official archives."""

import hashlib
import io
import pathlib
import pickle
import tarfile
from typing import Any

import numpy as np

from jax_ddpm.data.source import ArraySource, Batch, Path
from jax_ddpm.errors import UserError

_NAMES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
)  # fmt: skip
_HOME = "https://www.cs.toronto.edu/~kriz/cifar.html"


def cifar10(path: Path) -> ArraySource:
    """50,000 training and 10,000 test images, colour 32×32, in 10 classes (Krizhevsky 2009).

    ``path`` is the python or the binary archive, which hold the same data, or a folder with one of
    them. It is read without unpacking, after its checksum proves to be the published one.

    Raises:
      UserError: naming the file, where it is missing or not the official one.
    """
    given = pathlib.Path(path)
    candidates = [given / name for name in _NAMES] if given.is_dir() else [given]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise UserError(
            f"data.path: no {' or '.join(_NAMES)} at {path!r}; download one from {_HOME}"
        )
    with file.open("rb") as opened:
        checksum = hashlib.file_digest(opened, _md5).hexdigest()
    if checksum not in _READERS:
        raise UserError(
            f"{file}: its MD5 is {checksum}, not that of {' or '.join(_NAMES)}; download it again "
            f"from {_HOME}"
        )
    # In one pass: going back in a gzip stream means decompressing it anew.
    with tarfile.open(file, "r:gz") as archive:
        members = {m.name: data.read() for m in archive if (data := archive.extractfile(m))}
    read = _READERS[checksum]
    train = [read(members, f"data_batch_{i}") for i in range(1, 6)]
    splits = {
        "train": {name: np.concatenate([part[name] for part in train]) for name in train[0]},
        "heldout": read(members, "test_batch"),
    }
    return ArraySource(splits, num_levels=256, identity="cifar10", class_names=_CLASSES)


def _md5():
    return hashlib.md5(usedforsecurity=False)


def _batch(pixels: np.ndarray, labels: np.ndarray) -> Batch:
    """Rows of 3,072 bytes hold all red, then all green, then all blue pixels."""
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return {"image": np.ascontiguousarray(images), "label": labels.astype(np.int32)}


def _python(members: dict[str, bytes], name: str) -> Batch:
    content = _ArrayUnpickler(members[f"cifar-10-batches-py/{name}"]).load()
    return _batch(content[b"data"], np.array(content[b"labels"]))


def _binary(members: dict[str, bytes], name: str) -> Batch:
    rows = np.frombuffer(members[f"cifar-10-batches-bin/{name}.bin"], np.uint8).reshape(-1, 3073)
    return _batch(rows[:, 1:], rows[:, 0])


_PARTS_OF_ARRAYS: dict[tuple[str, str], Any] = {
    # Private since NumPy 2, so an array names the function.
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of Python 2, and builds only NumPy arrays."""

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content), encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PARTS_OF_ARRAYS:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return _PARTS_OF_ARRAYS[module, name]


# As published at _HOME.
_READERS = {
    "c58f30108f718f92721af3b95e74349a": _python,
    "c32a1d4ab5d03f1284b67883e8d87530": _binary,
}
