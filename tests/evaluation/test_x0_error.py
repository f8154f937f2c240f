"""The statistic of the optimal variance: an estimate of what is known, kept with a checkpoint."""

import json

import jax
import numpy as np
import pytest
import tiny
from exact import GaussianDenoiser

from jax_ddpm.data.source import ArraySource
from jax_ddpm.diffusion.optimal_variance import visited_times
from jax_ddpm.errors import UserError
from jax_ddpm.evaluation import x0_error as module
from jax_ddpm.evaluation.x0_error import estimate_x0_error, store_x0_error
from jax_ddpm.inference.companions import load_x0_error, x0_error_path
from jax_ddpm.inference.trained import Trained
from jax_ddpm.runtime.devices import make_mesh
from jax_ddpm.runtime.stopping import Stopped

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

SHAPE, LEVELS, SIZE = (4, 4, 1), 17, 300
MEAN, VAR = 0.2, 0.1
CONTINUOUS = {
    "process__name": "rectified_flow",
    "parameterisation__target": "velocity",
    "sampling__num_steps": 4,
}


@pytest.fixture(scope="module")
def source():
    """Random images in the training split, and others held out."""
    rng = np.random.default_rng(0)

    def split(count, low):
        levels = rng.integers(low, LEVELS, (count, *SHAPE), dtype=np.uint8)
        return {"image": levels, "label": (np.arange(count) % 3).astype(np.int32)}

    return ArraySource({"train": split(SIZE, 4), "heldout": split(9, 0)}, LEVELS, "random")


def make_trained(source, exact=False, **fields):
    """A model with a network of a few parameters, or the exact denoiser of N(MEAN, VAR)."""
    config = tiny.config(**({"model__class_conditional": True} | fields))
    network = tiny.network(1, 3)
    params = jax.tree.map(np.asarray, network.init(jax.random.key(0)))
    trained = Trained(config, source.spec, 4, "ema", params)
    trained.model.network = network
    if exact:
        denoiser = GaussianDenoiser(MEAN, VAR, trained.model.process)
        trained.model.denoiser = lambda *_, **__: denoiser
    return trained


@pytest.fixture(scope="module")
def trained(source):
    return make_trained(source)


@pytest.fixture
def over(monkeypatch):
    """``over(n)`` makes the mesh of n devices."""

    def change(num_devices):
        mesh = make_mesh(devices=jax.devices()[:num_devices])
        monkeypatch.setattr(module, "make_mesh", lambda: mesh)

    return change


PROCESSES = {
    "chain": {},
    "zero_terminal_snr": {
        "process__name": "jsd",
        "process__num_timesteps": 50,
        "parameterisation__target": "v",
    },
    "rectified_flow": CONTINUOUS,
    "edm": {"process__name": "edm", "sampling__num_steps": 4},
}
every_process = pytest.mark.parametrize("fields", PROCESSES.values(), ids=PROCESSES)


class TestEstimate:
    @every_process
    def test_is_that_of_the_training_split(self, source, fields):
        """An exact denoiser has x_0 - x̂_0 = (σ²·(x_0 - MEAN) - ασ·VAR·ε)/(α²·VAR + σ²).

        There is one draw for each of n pixels; the error of a sum of n squares is √(2/n) at most.
        """
        trained = make_trained(source, exact=True, **fields)
        statistic = estimate_x0_error(trained, source, SIZE, 64)
        process = trained.model.process
        images = source.batch("train", np.arange(SIZE))["image"]
        spread = np.mean((images / (LEVELS - 1) * 2 - 1 - MEAN) ** 2)
        times = visited_times(process)[::-1]
        np.testing.assert_array_equal(np.sort(process.log_snr(times)), statistic.log_snr)
        alpha, sigma = process.alpha(times), process.sigma(times)
        order = np.argsort(process.log_snr(times))
        squares = sigma**4 * spread + (alpha * sigma * VAR) ** 2
        expected = squares / (alpha**2 * VAR + sigma**2) ** 2
        error = 5 * np.sqrt(2 / images.size)
        np.testing.assert_allclose(statistic.mse, expected[order], rtol=error)

    @pytest.mark.parametrize("fields", [{}, CONTINUOUS], ids=["chain", "continuous"])
    @pytest.mark.parametrize(("batch_size", "num_devices"), [(7, 1), (64, 4), (300, 2)])
    def test_depends_neither_on_batch_size_nor_on_devices(
        self, source, over, fields, batch_size, num_devices
    ):
        trained = make_trained(source, **fields)
        over(1)
        expected = estimate_x0_error(trained, source, 50, 50)
        over(num_devices)
        actual = estimate_x0_error(trained, source, 50, batch_size)
        np.testing.assert_array_equal(actual.log_snr, expected.log_snr)
        np.testing.assert_allclose(actual.mse, expected.mse, rtol=1e-5)

    def test_of_more_examples_than_there_are_is_that_of_all(self, source, trained):
        everything, more = (estimate_x0_error(trained, source, n, 64) for n in (SIZE, 10_000))
        np.testing.assert_array_equal(everything.mse, more.mse)

    def test_of_a_conditional_model_is_told_the_labels(self, source, trained):
        """The network adds a number of each label, so other labels give other errors."""
        data = source.batch("train", np.arange(SIZE))
        other = {"image": data["image"], "label": (data["label"] + 1) % 3}
        relabelled = ArraySource({"train": other, "heldout": other}, LEVELS, "relabelled")
        one, two = (estimate_x0_error(trained, s, SIZE, 64) for s in (source, relabelled))
        assert np.all(one.mse != two.mse)

    def test_is_asked_to_stop_between_batches(self, source, trained):
        asked = []

        def poll():
            asked.append(None)
            if len(asked) == 3:
                raise Stopped("SIGTERM")

        with pytest.raises(Stopped):
            estimate_x0_error(trained, source, 100, 8, poll)

    def test_that_is_not_finite_is_refused(self, source):
        trained = make_trained(source)
        trained.params = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), trained.params)
        with pytest.raises(UserError, match="values of the errors are not finite"):
            estimate_x0_error(trained, source, 8, 8)


class TestStored:
    @pytest.fixture
    def workdir(self, source, trained, tmp_path):
        (tmp_path / "checkpoints" / "4").mkdir(parents=True)
        store_x0_error(trained, source, tmp_path, 20, 8)
        return tmp_path

    def test_comes_back_as_it_was(self, source, trained, workdir):
        expected = estimate_x0_error(trained, source, 20, 8)
        loaded = load_x0_error(workdir, 4, "ema", trained.model_record["sha256"])
        np.testing.assert_array_equal(loaded.log_snr, expected.log_snr)
        np.testing.assert_array_equal(loaded.mse, expected.mse)

    def test_says_of_what_it_is(self, source, trained, workdir):
        record = json.loads(x0_error_path(workdir, 4, "ema").read_text())
        assert record["model"] == trained.model_record
        assert (record["data"], record["num_examples"]) == ("random", 20)

    @pytest.mark.parametrize(("step", "item"), [(4, "params"), (2, "ema")])
    def test_of_other_parameters_is_missing(self, workdir, step, item):
        """The error is one line that says how it is made."""
        with pytest.raises(UserError, match=r"sampling\.variance=optimal: .* is missing") as caught:
            load_x0_error(workdir, step, item, "")
        assert "--mode=variance" in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "[]",
            "3",
            "{}",
            '{"log_snr": [1, 2]}',
            '{"log_snr": [1, 2], "mse": [0.5]}',
            '{"log_snr": [1, 2], "mse": [0.5, NaN]}',
            '{"log_snr": [2, 1], "mse": [0.5, 0.5]}',
            '{"log_snr": [], "mse": []}',
            '{"log_snr": ["a"], "mse": ["b"]}',
            '{"log_snr": 1, "mse": 0.5}',
        ],
    )
    def test_that_is_damaged_is_one_line(self, workdir, text):
        x0_error_path(workdir, 4, "ema").write_text(text)
        with pytest.raises(UserError, match="is damaged; make it anew") as caught:
            load_x0_error(workdir, 4, "ema", "")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("column", ["log_snr", "mse"])
    def test_that_was_edited_is_damaged(self, trained, workdir, column):
        path = x0_error_path(workdir, 4, "ema")
        stored = json.loads(path.read_text())
        stored[column][-1] *= 1.0001
        path.write_text(json.dumps(stored))
        with pytest.raises(UserError, match="is damaged; make it anew"):
            load_x0_error(workdir, 4, "ema", trained.model_record["sha256"])

    def test_of_a_model_that_was_replaced_is_refused(self, workdir):
        with pytest.raises(UserError, match="is of other parameters; make it anew") as caught:
            load_x0_error(workdir, 4, "ema", "0" * 64)
        assert "\n" not in str(caught.value)
