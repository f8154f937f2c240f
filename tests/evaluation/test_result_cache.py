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
        if self is None or event not in ("open", "os.rename", "os.mkdir"):
            return
        path, mode = arguments[:2]
        if not str(path).startswith(self.folder):
            return
        self.left -= 1
        if self.left >= 0:
            return
        Killer._active = None
        if self.torn and event == "open" and isinstance(mode, str) and "w" in mode:
            pathlib.Path(path).write_bytes(b"half")
        raise Killed


sys.addaudithook(Killer.hook)


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
    parts = ResultCache(tmp_path, IDENTITY)
    parts.complete(COUNT, Computer(), "squares")
    assert_complete(parts)
    assert_complete(ResultCache(tmp_path, IDENTITY))


def test_are_not_computed_again(tmp_path):
    ResultCache(tmp_path, IDENTITY).complete(2, Computer(), "squares")
    for count, missing in ((1, []), (2, []), (4, [2, 3]), (4, [])):
        computer = Computer()
        ResultCache(tmp_path, IDENTITY).complete(count, computer, "squares")
        assert computer.computed == missing


@pytest.mark.parametrize("lost", [[0], [1, 3], [0, 1, 2, 3]])
def test_those_that_got_lost_are(tmp_path, lost):
    parts, computer = ResultCache(tmp_path, IDENTITY), Computer()
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
        ResultCache(tmp_path, IDENTITY).complete(COUNT, Computer(last), "squares")
    assert finished(tmp_path) == [*range(last)]
    ResultCache(tmp_path, IDENTITY).complete(COUNT, computer, "squares")
    assert computer.computed == [*range(last, COUNT)]
    assert_complete(ResultCache(tmp_path, IDENTITY))


@pytest.mark.parametrize("torn", [False, True])
def test_killed_before_any_file_operation(tmp_path, torn):
    for k in itertools.count():
        cache, computer = tmp_path / str(k), Computer()
        try:
            with Killer(cache, k, torn):
                ResultCache(cache, IDENTITY).complete(COUNT, Computer(), "squares")
            break
        except Killed:
            kept = finished(cache)
            ResultCache(cache, IDENTITY).complete(COUNT, computer, "squares")
            assert sorted([*kept, *computer.computed]) == [*range(COUNT)]
            assert_complete(ResultCache(cache, IDENTITY))
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
    ResultCache(tmp_path, IDENTITY).complete(COUNT, Computer(), "squares")
    computer = Computer()
    ResultCache(tmp_path, IDENTITY | other).complete(COUNT, computer, "squares")
    assert computer.computed == [*range(COUNT)]
    assert len([*tmp_path.iterdir()]) == 2


def test_the_order_of_fields_means_nothing(tmp_path):
    ResultCache(tmp_path, IDENTITY).complete(COUNT, Computer(), "squares")
    ResultCache(tmp_path, dict(reversed(IDENTITY.items()))).complete(COUNT, Computer(0), "squares")


@pytest.mark.parametrize("damage", [b"", b"no archive", None])
def test_damaged_ones_are_named(tmp_path, damage):
    """Empty as after a power cut, something else, or with a bit changed in an array."""
    parts = ResultCache(tmp_path, IDENTITY)
    parts.complete(COUNT, Computer(), "squares")
    (path,) = tmp_path.glob("*/000002.npz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content if damage is None else damage)
    with pytest.raises(UserError, match=r"000002\.npz: cannot be read; remove it") as caught:
        parts.load(2)
    assert "\n" not in str(caught.value)
    path.unlink()
    parts.complete(COUNT, Computer(), "squares")
    assert_complete(parts)
