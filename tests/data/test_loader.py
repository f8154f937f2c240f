import io
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from jax_ddpm.data.lazy import Encoded, KeptSource, LazySource
from jax_ddpm.data.loader import Loader
from jax_ddpm.data.plan import batch_indices
from jax_ddpm.data.source import ArraySource, image_spec

NUM_EXAMPLES, BATCH_SIZE, SEED = 50, 12, 3


def the_indices(step):
    return batch_indices(SEED, step, BATCH_SIZE, NUM_EXAMPLES)


class Recording:
    """A source that notes what it is asked for, and fails or waits when it is told to."""

    def __init__(self):
        images = np.arange(NUM_EXAMPLES, dtype=np.uint8).reshape(-1, 1, 1, 1)
        arrays = {"image": images, "label": np.arange(NUM_EXAMPLES, dtype=np.int32)}
        self._source = ArraySource({"train": arrays}, num_levels=256, identity="numbers")
        self.spec = self._source.spec
        self.asked = threading.Semaphore(0)
        self.examples = []
        self.fail_at = None
        self.go_on = threading.Event()
        self.go_on.set()

    def batch(self, split, indices):
        self.examples.append(indices.tolist())
        self.asked.release()
        self.go_on.wait()
        if self.fail_at is not None and np.array_equal(indices, the_indices(self.fail_at)):
            raise OSError(f"step {self.fail_at}")
        return self._source.batch(split, indices)


@pytest.fixture
def source():
    source = Recording()
    yield source
    source.go_on.set()


def assert_equal(batch, expected):
    assert batch.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(batch[name], expected[name])
        assert batch[name].dtype == expected[name].dtype


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
@pytest.mark.parametrize("start", [0, 9])
def test_batches_are_those_of_the_plan_from_any_step(source, start, ahead):
    with Loader(source, SEED, BATCH_SIZE, start, ahead=ahead) as loader:
        for step in range(start, start + 10):
            assert_equal(next(loader), source.batch("train", the_indices(step)))


@pytest.mark.parametrize(
    "places",
    [
        [range(0, 6), range(6, 12)],
        [range(0, 12, 3), range(1, 12, 3), range(2, 12, 3)],
        [range(0, 1), range(1, 12)],
    ],
)
def test_rows_of_all_processes_make_up_the_batch(source, places):
    loaders = [Loader(source, SEED, BATCH_SIZE, 4, np.array(rows)) for rows in places]
    for step in range(4, 10):
        expected = source.batch("train", the_indices(step))
        whole = {name: np.empty_like(array) for name, array in expected.items()}
        for rows, loader in zip(places, loaders, strict=True):
            for name, array in next(loader).items():
                whole[name][rows] = array
        assert_equal(whole, expected)
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("rows", [np.array([2, 3, 7]), slice(3, 5)])
def test_only_its_rows_are_read(source, rows):
    with Loader(source, SEED, BATCH_SIZE, 0, rows, ahead=1) as loader:
        for _ in range(5):
            next(loader)
        read = source.examples[:5]
    assert read == [the_indices(step)[rows].tolist() for step in range(5)]


def encoded(split, index):
    """PNG files of 3×3, of which two neighbours are damaged."""
    file = io.BytesIO()
    Image.new("RGB", (3, 3), (index, 0, 0)).save(file, "PNG")
    content = file.getvalue()
    return Encoded(str(index), content[:50] if index in (7, 8) else content, {"label": index % 5})


@pytest.mark.filterwarnings("ignore:.*damaged")
@pytest.mark.parametrize("ahead", [0, 1, 4])
@pytest.mark.parametrize("memory", [lambda source: source, KeptSource])
def test_images_decoded_in_threads_and_stand_ins_are_the_same(memory, ahead):
    spec = image_spec((3, 3, 3), 256, 5, {"train": NUM_EXAMPLES}, "numbers")
    numbers = np.arange(NUM_EXAMPLES)
    numbers[[7, 8]] = 9
    with Loader(memory(LazySource(encoded, spec, 0)), SEED, BATCH_SIZE, 0, ahead=ahead) as loader:
        for step in range(10):
            batch, expected = next(loader), numbers[the_indices(step)]
            assert batch["image"].shape == (BATCH_SIZE, 3, 3, 3)
            np.testing.assert_array_equal(batch["image"][:, 1, 1, 0], expected)
            np.testing.assert_array_equal(batch["label"], expected % 5)


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_errors_surface_at_their_step(source, ahead):
    source.fail_at = 3
    with Loader(source, SEED, BATCH_SIZE, 0, ahead=ahead) as loader:
        batches = [next(loader) for _ in range(3)]
        with pytest.raises(OSError, match="step 3"):
            next(loader)
    for step, batch in enumerate(batches):
        assert_equal(batch, source.batch("train", the_indices(step)))


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
    for _ in range(3):
        assert source.asked.acquire(timeout=10)
    loader.close()
    assert not source.go_on.is_set()
    source.go_on.set()
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_once_closed_no_thread_stays_and_nothing_more_is_read(source):
    source.go_on.clear()
    before = set(threading.enumerate())
    loader = Loader(source, SEED, BATCH_SIZE, 0, ahead=3)
    for _ in range(3):
        assert source.asked.acquire(timeout=10)
    at_work = set(threading.enumerate()) - before
    assert len(at_work) == 3
    loader.close()
    source.go_on.set()
    for thread in at_work:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in at_work)
    assert len(source.examples) == 3


@pytest.fixture
def interruptible():
    """SIGINT as in a terminal: started in the background, a process ignores it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_the_wait_for_a_batch(source):
    source.go_on.clear()
    main = threading.main_thread().ident
    timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
    with Loader(source, SEED, BATCH_SIZE, 0) as loader:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            next(loader)
    assert not source.go_on.is_set()


def test_a_process_ends_that_never_closed_its_loader():
    script = (
        "import numpy, warnings; warnings.simplefilter('error');"
        "from jax_ddpm.data.loader import Loader; from jax_ddpm.data.source import ArraySource;"
        "arrays = {'image': numpy.zeros((50, 2, 2, 1), numpy.uint8)};"
        "loader = Loader(ArraySource({'train': arrays}, 2, ''), 0, 8, 0, ahead=3); next(loader);"
        "print('read', flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=100, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"read\n", b"")


def test_grain_is_only_imported_where_something_streams():
    script = "import sys; import jax_ddpm.data.loader, jax_ddpm.data.folder; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert b"grain" not in done.stdout.split()
