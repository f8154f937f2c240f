"""PyTorch state dicts as NumPy arrays, without PyTorch."""

import collections
import io
import pathlib
import pickle
import zipfile
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_ddpm.errors import UserError

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # begins the stream format

_DTYPES = {
    "BFloat16Storage": "bfloat16",
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ShortStorage": "int16",
}


def load_state_dict(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays, read-only, of a ``.safetensors`` file or of a state dict that torch.save wrote.

    Both formats of torch.save are read: the zip archive, and the stream from before PyTorch 1.6.
    Tensors that share a storage share memory here too. Nothing in the file is executed: its pickle
    may name only ordered dictionaries, tensors, parameters and storages.

    Raises:
      UserError: naming the file and what is wrong with it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a state dict")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        content = path.read_bytes()
        read = _read_zip if content.startswith(b"PK") else _read_stream
        tensors, storages = read(content)
        return {str(name): _array(name, tensor, storages) for name, tensor in tensors.items()}
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path}: not a readable state dict ({reason}); download it again, or write it with "
            "torch.save(model.state_dict(), …)"
        ) from error


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        from safetensors.numpy import load_file
    except ImportError as error:
        raise UserError(f"{path}: reading it needs `pip install safetensors`") from error
    arrays = load_file(path)
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


class _Storage(NamedTuple):
    dtype: str
    key: str
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Reads tensors as descriptions, and refuses every other global.

    The pickle gets only objects that it cannot change: strings, tuples and bound methods.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        known = {
            "collections.OrderedDict": collections.OrderedDict,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": self._parameter,
        }
        if (found := known.get(f"{module}.{name}")) is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not executed")
        return found

    def persistent_load(self, identifier: Any) -> _Storage:
        kind, dtype, key, _, size, *view = identifier
        if kind != "storage" or any(view):
            raise pickle.UnpicklingError(f"unknown kind of storage {identifier}")
        return _Storage(dtype, key, size)

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
        return _Tensor(storage, offset, shape, strides)

    def _parameter(self, tensor: Any, *_: Any) -> Any:
        return tensor


def _read_zip(content: bytes) -> tuple[dict, dict[str, Any]]:
    """``…/data.pkl`` holds the pickle, ``…/data/<key>`` each storage."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
        pickled = next((name for name in names if name.endswith("/data.pkl")), None)
        if pickled is None:
            raise ValueError("a zip archive without data.pkl")
        root = pickled.removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        tensors = _Unpickler(io.BytesIO(archive.read(pickled))).load()
        keys = {tensor.storage.key for tensor in _tensors(tensors)}
        return tensors, {key: archive.read(f"{root}data/{key}") for key in keys}


def _read_stream(content: bytes) -> tuple[dict, dict[str, Any]]:
    """Five pickles (magic number, version, machine, tensors, storage keys), then the storages."""
    stream = io.BytesIO(content)
    if _Unpickler(stream).load() != _MAGIC_NUMBER:
        raise ValueError("it is not a file of torch.save")
    _, _, tensors, keys = (_Unpickler(stream).load() for _ in range(4))
    storages = {tensor.storage.key: tensor.storage for tensor in _tensors(tensors)}
    data, position = {}, stream.tell()
    for key in keys:
        start = position + 8  # the number of elements
        position = start + storages[key].size * jnp.dtype(storages[key].dtype).itemsize
        data[key] = memoryview(content)[start:position]
    return tensors, data


def _tensors(state_dict: Any) -> list[_Tensor]:
    if not isinstance(state_dict, dict):
        raise ValueError("it holds no dictionary")
    for name, value in state_dict.items():
        if not isinstance(value, _Tensor):
            raise ValueError(f"its entry {name!r} is not a tensor")
    return list(state_dict.values())


def _array(name: str, tensor: _Tensor, storages: dict[str, Any]) -> np.ndarray:
    """A view of the storage, never a copy, so that no description can claim much memory."""
    dtype = jnp.dtype(tensor.storage.dtype)
    storage = np.frombuffer(storages[tensor.storage.key], np.uint8).view(dtype)
    if storage.size != tensor.storage.size:
        raise ValueError(f"the data of {name} is cut off")
    if 0 in tensor.shape:
        return storage[:0].reshape(tensor.shape)
    last = tensor.offset + sum(
        (length - 1) * stride for length, stride in zip(tensor.shape, tensor.strides, strict=True)
    )
    if min(tensor.offset, *tensor.strides, *tensor.shape, 0) < 0 or last >= storage.size:
        raise ValueError(f"{name} reaches beyond its storage")
    strides = [stride * dtype.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(
        storage[tensor.offset :], tensor.shape, strides, writeable=False
    )
