"""Parts of long computations: however they are killed, each is whole or not there."""

import itertools
import pathlib
import sys

import numpy as np
import pytest

from jax_ddpm.errors import UserError
from jax_ddpm.evaluation.result_cache import ResultCache

COUNT = 4
IDENTITY = {"computes": "squares", "model": {"sha256": "0f", "steps": [1, 2]}, "seed": 0}


class Killed(BaseException):
    """Caught as little as SIGKILL."""


class Killer:
    """Dies before the k-th file operation below a folder; ``torn`` leaves half of a file behind."""

    _active = None

    def __init__(self, folder, k, torn):
        self.folder, self.left, self.torn = str(folder), k, torn

    def __enter__(self):
        Killer._active = self

    def __exit__(self, *_):
        Killer._active = None

    @staticmethod
    def hook(event, arguments):
        self = Killer._active
        if self is None or event not in ("open", "os.rename", "os.mkdir", "os.remove"):
            return
        path, mode = arguments[:2]
        if not str(path).startswith(self.folder):
            return
        self.left -= 1
        if self.left >= 0:
            return
        Killer._active = None
        if self.left == -1 and self.torn and event == "open" and mode == "xb":
            pathlib.Path(path).write_bytes(b"half")
        Killer._active = self  # the dead clear nothing up
        raise Killed


sys.addaudithook(Killer.hook)


def results(cache, identity=IDENTITY):
    return ResultCache(cache, identity, arrays(0))


def arrays(part):
    """The arrays of part number ``part``, in dtypes that must survive."""
    rng = np.random.default_rng(part)
    return {
        "images": rng.integers(0, 256, (part + 1, 2, 3, 1), dtype=np.uint8),
        "features": rng.standard_normal((part + 1, 5)).astype(np.float32),
        "terms": rng.standard_normal(part),
        "inside": rng.random(3) < 0.5,
    }


class Computer:
    """Computes parts and notes which; dies before part number ``last`` of those wanted."""

    def __init__(self, last=None):
        self.computed, self.last = [], last

    def __call__(self, wanted):
        for part in wanted:
            if len(self.computed) == self.last:
                raise Killed
            self.computed.append(part)
            yield part, arrays(part)


def assert_complete(parts, count=COUNT):
    for part in range(count):
        found, expected = parts.load(part), arrays(part)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)


def finished(cache):
    return sorted(int(path.stem) for path in cache.glob("*/*.npz"))


def test_come_back_to_the_last_bit(tmp_path):
    parts = results(tmp_path)
    parts.complete(COUNT, Computer(), "squares")
    assert_complete(parts)
    assert_complete(results(tmp_path))


def test_are_not_computed_again(tmp_path):
    results(tmp_path).complete(2, Computer(), "squares")
    for count, missing in ((1, []), (2, []), (4, [2, 3]), (4, [])):
        computer = Computer()
        results(tmp_path).complete(count, computer, "squares")
        assert computer.computed == missing


@pytest.mark.parametrize("lost", [[0], [1, 3], [0, 1, 2, 3]])
def test_those_that_got_lost_are(tmp_path, lost):
    parts, computer = results(tmp_path), Computer()
    parts.complete(COUNT, Computer(), "squares")
    for part in lost:
        (path,) = tmp_path.glob(f"*/{part:06}.npz")
        path.unlink()
    parts.complete(COUNT, computer, "squares")
    assert computer.computed == lost
    assert_complete(parts)


@pytest.mark.parametrize("last", range(COUNT))
def test_computation_goes_on_where_it_was_killed(tmp_path, last):
    computer = Computer()
    with pytest.raises(Killed):
        results(tmp_path).complete(COUNT, Computer(last), "squares")
    assert finished(tmp_path) == [*range(last)]
    results(tmp_path).complete(COUNT, computer, "squares")
    assert computer.computed == [*range(last, COUNT)]
    assert_complete(results(tmp_path))


@pytest.mark.parametrize("torn", [False, True])
def test_killed_before_any_file_operation(tmp_path, torn):
    for k in itertools.count():
        cache, computer = tmp_path / str(k), Computer()
        try:
            with Killer(cache, k, torn):
                results(cache).complete(COUNT, Computer(), "squares")
            break
        except Killed:
            kept = finished(cache)
            results(cache).complete(COUNT, computer, "squares")
            assert sorted([*kept, *computer.computed]) == [*range(COUNT)]
            assert_complete(results(cache))
    assert k > 2 * COUNT


@pytest.mark.parametrize(
    "other",
    [
        {"computes": "cubes"},
        {"model": {"sha256": "0e", "steps": [1, 2]}},
        {"model": {"sha256": "0f", "steps": [2, 1]}},
        {"model": {"sha256": "0f", "steps": [1, 2], "clip": None}},
        {"seed": 1},
        {"seed": "0"},
        {"seed": None},
        {"new": 0},
    ],
)
def test_of_another_identity_are_others(tmp_path, other):
    results(tmp_path).complete(COUNT, Computer(), "squares")
    computer = Computer()
    results(tmp_path, IDENTITY | other).complete(COUNT, computer, "squares")
    assert computer.computed == [*range(COUNT)]
    assert len([*tmp_path.iterdir()]) == 2


def test_the_order_of_fields_means_nothing(tmp_path):
    results(tmp_path).complete(COUNT, Computer(), "squares")
    results(tmp_path, dict(reversed(IDENTITY.items()))).complete(COUNT, Computer(0), "squares")


@pytest.mark.parametrize("damage", ["empty", "cut off", "changed", "other arrays"])
def test_damaged_ones_are_named_and_computed_again(tmp_path, damage):
    """Empty as after a power cut, with a bit changed in an array, or of another program."""
    parts, computer = results(tmp_path), Computer()
    parts.complete(COUNT, Computer(), "squares")
    (path,) = tmp_path.glob("*/000002.npz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    lengths = {"empty": 0, "cut off": 100, "changed": None}
    if damage in lengths:
        path.write_bytes(content[: lengths[damage]])
    else:
        np.savez(path, pictures=np.zeros(3))
    with pytest.raises(UserError, match=r"000002\.npz .*; the same command computes it again$"):
        parts.load(2)
    with pytest.warns(UserWarning, match=r"000002\.npz is damaged; computing it again"):
        parts.complete(COUNT, computer, "squares")
    assert computer.computed == [2]
    assert_complete(parts)


def test_another_process_that_computes_them_is_waited_for(tmp_path):
    """By the user: neither does the other's work."""

    def compute(wanted):
        with pytest.raises(UserError, match=r"another process computes squares there; wait"):
            results(tmp_path).complete(COUNT, Computer(0), "squares")
        yield from Computer()(wanted)

    results(tmp_path).complete(COUNT, compute, "squares")
    assert_complete(results(tmp_path))


def test_what_killed_writers_left_is_removed(tmp_path):
    results(tmp_path).complete(1, Computer(), "squares")
    (folder,) = tmp_path.iterdir()
    (folder / ".000001.npz.jax_ddpm-partial").write_bytes(b"half")
    results(tmp_path).complete(2, Computer(), "squares")
    names = {path.name for path in folder.iterdir()}
    assert names == {"identity.json", "000000.npz", "000001.npz"}
