import threading

import numpy as np
import pytest

from jax_ddpm.data.loader import Loader
from jax_ddpm.data.plan import batch_indices
from jax_ddpm.data.source import ArraySource

NUM_EXAMPLES, BATCH_SIZE, SEED = 50, 12, 3


class Recording:
    """A source that notes what it is asked for, and fails or waits when it is told to."""

    def __init__(self):
        images = np.arange(NUM_EXAMPLES, dtype=np.uint8).reshape(-1, 1, 1, 1)
        arrays = {"image": images, "label": np.arange(NUM_EXAMPLES, dtype=np.int32)}
        self._source = ArraySource({"train": arrays}, num_levels=256, identity="numbers")
        self.spec = self._source.spec
        self.asked = threading.Semaphore(0)
        self.num_asked = 0
        self.fail_at = None
        self.go_on = threading.Event()
        self.go_on.set()

    def batch(self, split, indices):
        number, self.num_asked = self.num_asked, self.num_asked + 1
        self.asked.release()
        self.go_on.wait()
        if number == self.fail_at:
            raise OSError(f"call {number}")
        return self._source.batch(split, indices)


@pytest.fixture
def source():
    source = Recording()
    yield source
    source.go_on.set()


def the_batch(source, step):
    return source.batch("train", batch_indices(SEED, step, BATCH_SIZE, NUM_EXAMPLES))


@pytest.mark.parametrize("ahead", [0, 1, 5])
@pytest.mark.parametrize("start", [0, 9])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 12])
def test_shards_make_up_the_batches_of_the_plan(source, ahead, start, num_shards):
    loaders = [
        Loader(source, SEED, BATCH_SIZE, start, shard=(k, num_shards), ahead=ahead)
        for k in range(num_shards)
    ]
    for step in range(start, start + 6):
        parts = [next(loader) for loader in loaders]
        for name, expected in the_batch(source, step).items():
            assert {len(part[name]) for part in parts} == {BATCH_SIZE // num_shards}
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), expected)
    for loader in loaders:
        loader.close()


def test_a_batch_that_cannot_be_cut_evenly_is_an_error(source):
    with (
        Loader(source, SEED, BATCH_SIZE, 0, shard=(0, 5)) as loader,
        pytest.raises(ValueError, match="equal"),
    ):
        next(loader)


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_errors_surface_at_their_step(source, ahead):
    source.fail_at = 3
    with Loader(source, SEED, BATCH_SIZE, 0, ahead=ahead) as loader:
        batches = [next(loader) for _ in range(3)]
        with pytest.raises(OSError, match="call 3"):
            next(loader)
    for step, batch in enumerate(batches):
        np.testing.assert_array_equal(batch["image"], the_batch(source, step)["image"])


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_it_prepares_as_many_steps_ahead_as_it_may(source, ahead):
    seen = 0
    with Loader(source, SEED, BATCH_SIZE, 0, ahead=ahead) as loader:
        for taken in range(4):
            while seen < taken + ahead:
                assert source.asked.acquire(timeout=10)
                seen += 1
            assert not source.asked.acquire(timeout=0.05)
            next(loader)


def test_closing_does_not_wait_for_a_source_that_hangs(source):
    source.go_on.clear()
    loader = Loader(source, SEED, BATCH_SIZE, 0, ahead=3)
    assert source.asked.acquire(timeout=10)
    loader.close()
    assert not source.go_on.is_set()
    source.go_on.set()
    assert not source.asked.acquire(timeout=0.05), "the steps that waited are given up"
    with pytest.raises(RuntimeError):
        next(loader)
