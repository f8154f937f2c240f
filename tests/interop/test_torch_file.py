"""PyTorch's files read without PyTorch, and against what PyTorch itself wrote."""

import collections
import contextlib
import io
import os
import pickle
import struct
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jax_ddpm.errors import UserError
from jax_ddpm.interop.torch_file import load_state_dict

MAGIC_NUMBER = 119547037146038801333356
STORAGE = {"float32": "FloatStorage", "int64": "LongStorage", "float16": "HalfStorage"}


class Global:
    """Pickled as the bare name of an object in a module that need not exist."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Pickled as a call of a global."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments


class Stored:
    """Pickled as a persistent id."""

    def __init__(self, *identifier):
        self.identifier = identifier


class Pickler(pickle._Pickler):
    """Writes the above at protocol 2, as torch.save does."""

    def save(self, obj, *arguments, **keywords):
        if isinstance(obj, Global):
            self.write(f"c{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
        elif isinstance(obj, Stored):
            self.save(obj.identifier)
            self.write(pickle.BINPERSID)
        else:
            super().save(obj, *arguments, **keywords)


def pickled(obj):
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(obj)
    return buffer.getvalue()


REBUILD = Global("torch._utils", "_rebuild_tensor_v2")


def tensor(dtype, key, count, offset, shape, strides, *view):
    storage = Stored("storage", Global("torch", STORAGE[dtype]), key, "cpu", count, *view)
    return Call(REBUILD, storage, offset, shape, strides, False, collections.OrderedDict())


def zip_file(state_dict, storages, byteorder=b"little"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model/data.pkl", pickled(state_dict))
        archive.writestr("model/byteorder", byteorder)
        for key, values in storages.items():
            archive.writestr(f"model/data/{key}", values.tobytes())
    return buffer.getvalue()


def stream_file(state_dict, storages, magic_number=MAGIC_NUMBER):
    machine = {"protocol_version": 1001, "little_endian": True}
    parts = [pickled(part) for part in (magic_number, 1001, machine, state_dict, list(storages))]
    parts += [struct.pack("<q", values.size) + values.tobytes() for values in storages.values()]
    return b"".join(parts)


@pytest.fixture
def load(tmp_path):
    def load(content, name="weights.pth"):
        (tmp_path / name).write_bytes(content)
        return load_state_dict(tmp_path / name)

    return load


@pytest.fixture
def refused(load):
    """The one line that a file is refused with."""

    def refused(content, name="weights.pth"):
        with pytest.raises(UserError) as caught:
            load(content, name)
        message = str(caught.value)
        assert name in message
        assert "\n" not in message
        return message

    return refused


both_formats = pytest.mark.parametrize(
    ("write", "view"), [(zip_file, ()), (stream_file, (None,))], ids=["zip", "stream"]
)


@both_formats
def test_strides_offsets_and_shared_storages(load, write, view):
    floats, ints = np.arange(12, dtype=np.float32), np.array([5, 7])
    halves = np.array([0.5], np.float16)
    arrays = load(
        write(
            collections.OrderedDict(
                whole=tensor("float32", "0", 12, 0, (3, 4), (4, 1), *view),
                transposed=tensor("float32", "0", 12, 0, (4, 3), (1, 4), *view),
                part=tensor("float32", "0", 12, 5, (2, 3), (4, 1), *view),
                expanded=tensor("float32", "0", 12, 2, (3, 2), (0, 1), *view),
                scalar=tensor("int64", "1", 2, 1, (), (), *view),
                empty=tensor("int64", "1", 2, 0, (0, 3), (3, 1), *view),
                parameter=Call(
                    Global("torch._utils", "_rebuild_parameter"),
                    tensor("float16", "2", 1, 0, (1,), (1,), *view),
                    True,
                    collections.OrderedDict(),
                ),
            ),
            {"0": floats, "1": ints, "2": halves},
        )
    )
    table = floats.reshape(3, 4)
    expected = {
        "whole": table,
        "transposed": table.T,
        "part": table[1:, 1:],
        "expanded": np.tile(floats[2:4], (3, 1)),
        "scalar": ints[1],
        "empty": np.zeros((0, 3), np.int64),
        "parameter": halves,
    }
    assert list(arrays) == list(expected)
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype
        assert not array.flags.writeable
        np.testing.assert_array_equal(array, expected[name], strict=True)
    assert np.shares_memory(arrays["whole"], arrays["transposed"])


@both_formats
@pytest.mark.parametrize(
    "layout",
    [(0, (13,), (1,)), (1, (3, 4), (4, 1)), (0, (2,), (12,)), (-1, (2,), (1,)), (3, (2,), (-1,))],
)
def test_memory_outside_the_storage_is_never_read(refused, write, view, layout):
    content = write({"w": tensor("float32", "0", 12, *layout, *view)}, {"0": np.zeros(12, "f")})
    assert "reaches beyond" in refused(content)


def test_a_huge_expanded_tensor_takes_no_memory(load):
    content = zip_file({"w": tensor("float32", "0", 1, 0, (2**40,), (0,))}, {"0": np.ones(1, "f")})
    assert load(content)["w"].shape == (2**40,)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@both_formats
def test_nothing_is_executed(refused, tmp_path, write, view):
    """Python's own reader runs a command; ours names what it does not run."""
    trace = tmp_path / "trace"
    pickle.loads(pickle.dumps(Malicious(trace), protocol=2))
    trace.unlink()

    message = refused(write({"w": Malicious(trace)}, {}))
    assert f"{os.system.__module__}.system" in message
    assert not trace.exists()
    assert f"{os.system.__module__}.system" in refused(pickle.dumps(Malicious(trace), protocol=2))
    assert not trace.exists()


@pytest.mark.parametrize(
    "name",
    [
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("collections", "OrderedDict.fromkeys"),
    ],
    ids=".".join,
)
def test_other_globals_are_refused_and_named(refused, name):
    modules = set(sys.modules)
    assert ".".join(name) in refused(zip_file({"w": Global(*name)}, {}))
    assert set(sys.modules) == modules, "not even imported"


@both_formats
def test_truncated_files_are_refused_in_one_line(refused, write, view):
    rng = np.random.default_rng(0)
    storages = {"0": rng.standard_normal(40).astype(np.float32), "1": rng.integers(0, 9, 30)}
    state_dict = {
        "w": tensor("float32", "0", 40, 0, (40,), (1,), *view),
        "n": tensor("int64", "1", 30, 0, (30,), (1,), *view),
    }
    content = write(state_dict, storages)
    for length in {0, 1, 2, len(content) - 1, *rng.integers(0, len(content), 200).tolist()}:
        assert "not a readable state dict" in refused(content[:length])


@both_formats
def test_damaged_files_are_refused_or_read(load, write, view):
    rng = np.random.default_rng(1)
    storages = {"0": np.ones(4, np.float32)}
    content = write({"w": tensor("float32", "0", 4, 0, (4,), (1,), *view)}, storages)
    for position in rng.integers(0, len(content), 200):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(rng.integers(8))
        with contextlib.suppress(UserError):
            assert all(isinstance(a, np.ndarray) for a in load(bytes(damaged)).values())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Ran out of input"),
        (b"\x89PNG\r\n\x1a\n", "not a readable state dict"),
        (pickled({"w": 1}), "not a file of torch.save"),
        (stream_file({}, {}, magic_number=7), "not a file of torch.save"),
        (zip_file([], {}), "no dictionary"),
        (zip_file({"epoch": 3}, {}), "'epoch' is not a tensor"),
        (zip_file({}, {}, byteorder=b"big"), "big-endian"),
        (zip_file({"w": tensor("int64", "0", 1, 0, (), ())}, {}), "data/0"),
        (
            zip_file({"w": tensor("int64", "0", 2, 0, (2,), (1,))}, {"0": np.zeros(1, int)}),
            "data of w is cut off",
        ),
        (
            stream_file({"w": tensor("int64", "0", 1, 0, (), (), ("1", 0, 1))}, {}),
            "unknown kind of storage",
        ),
    ],
)
def test_other_files_are_refused_with_the_reason(refused, content, reason):
    assert reason in refused(content)


def test_a_zip_archive_of_something_else(refused):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "data.pkl" in refused(buffer.getvalue())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.pth: no such file"):
        load_state_dict(tmp_path / "absent.pth")


def test_safetensors(tmp_path, refused):
    numpy = pytest.importorskip("safetensors.numpy")
    arrays = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(3)}
    numpy.save_file(arrays, tmp_path / "weights.safetensors")
    for name, array in load_state_dict(tmp_path / "weights.safetensors").items():
        np.testing.assert_array_equal(array, arrays[name], strict=True)
    content = (tmp_path / "weights.safetensors").read_bytes()
    refused(content[:-1], "weights.safetensors")


def test_safetensors_without_its_package(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    assert "pip install safetensors" in refused(b"", "weights.safetensors")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
def test_reads_what_pytorch_writes(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    base = torch.randn(6, 8)
    state_dict = torch.nn.BatchNorm2d(3).state_dict() | {
        "base": base,
        "transposed": base.T,
        "every_other": base[1::2, ::3],
        "expanded": base[:, :1].expand(6, 5),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "half": torch.randn(3).half(),
        "bool": torch.tensor([True, False]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "int8": torch.arange(-2, 2, dtype=torch.int8),
        "int16": torch.arange(-2, 2, dtype=torch.int16),
        "int32": torch.arange(-2, 2, dtype=torch.int32),
    }
    bfloat16 = torch.randn(4).bfloat16()
    path = tmp_path / "weights.pth"
    torch.save(state_dict | {"bfloat16": bfloat16}, path, _use_new_zipfile_serialization=zipped)
    arrays = load_state_dict(path)
    found = arrays.pop("bfloat16")
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.astype(np.float32), bfloat16.float().numpy())
    assert arrays.keys() == state_dict.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, state_dict[name].detach().numpy(), strict=True)
    assert np.shares_memory(arrays["base"], arrays["transposed"])
