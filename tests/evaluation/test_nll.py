"""Bits/dim of a model by its ODE over a split, each example once, against closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from exact import GaussianDenoiser

from jax_ddpm.codecs.pixels import Pixels
from jax_ddpm.data.source import ArraySource
from jax_ddpm.diffusion.ode_likelihood import dequantised_nll
from jax_ddpm.errors import UserError
from jax_ddpm.evaluation import split_terms as module
from jax_ddpm.evaluation.evaluate import evaluate
from jax_ddpm.evaluation.nll import measure_nll
from jax_ddpm.evaluation.quality import Evaluation
from jax_ddpm.evaluation.record import load_record
from jax_ddpm.inference.trained import Trained
from jax_ddpm.keys import Stream, stream_key
from jax_ddpm.runtime.devices import make_mesh
from jax_ddpm.runtime.stopping import Stopped

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

SHAPE, LEVELS, SIZE = (4, 4, 1), 17, 11
MEAN, STD = 0.1, 0.3


def make_source():
    """Pixels of a Gaussian."""
    rng = np.random.default_rng(0)

    def split(count):
        x0 = rng.normal(MEAN, STD, (count, *SHAPE))
        levels = np.clip(np.round((x0 + 1) * (LEVELS - 1) / 2), 0, LEVELS - 1).astype(np.uint8)
        return {"image": levels, "label": (np.arange(count) % 3).astype(np.int32)}

    return ArraySource({"train": split(9), "heldout": split(SIZE)}, LEVELS, "levels of a Gaussian")


def make_trained(source, denoiser=None, **fields):
    """A network of a few parameters, or ``process → denoiser`` in its place."""
    network = tiny.network(1, 3)
    params = jax.tree.map(np.asarray, network.init(jax.random.key(0)))
    config = tiny.config(**({"model__class_conditional": True} | fields))
    trained = Trained(config, source.spec, 0, "ema", params)
    trained.model.network = network
    if denoiser:
        exact = denoiser(trained.model.process)
        trained.model.denoiser = lambda params, clip: exact
    return trained


def gaussian(process):
    return GaussianDenoiser(MEAN, STD**2, process)


@pytest.fixture(scope="module")
def source():
    return make_source()


@pytest.fixture(scope="module")
def trained(source):
    return make_trained(source)


@pytest.fixture(scope="module")
def whole(trained, source, tmp_path_factory):
    """The result over all held-out examples, in batches of four."""
    return measure_nll(trained, source, "heldout", SIZE, 4, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def alone(trained, source):
    """Bits/dim of every held-out example by its place in the split, one at a time."""
    model, key = trained.model, stream_key(jax.random.key(0), Stream.LIKELIHOOD)
    denoiser = model.denoiser(jax.tree.map(jnp.asarray, trained.params), clip=False)

    @jax.jit
    def bits(place, batch):
        x0, keys = Pixels((), LEVELS).encode(batch), jax.random.fold_in(key, place)[None]
        given = {"label": batch["label"]}
        return dequantised_nll(model.process, denoiser, x0, keys, given, LEVELS) / np.log(2)

    batches = (source.batch("heldout", np.array([i])) for i in range(SIZE))
    return np.concatenate([bits(i, batch) for i, batch in enumerate(batches)])


class Reads:
    """A source that notes which examples are read."""

    def __init__(self, source):
        self.spec, self.reads, self._source = source.spec, [], source

    def batch(self, split, indices):
        self.reads.append(indices.tolist())
        return self._source.batch(split, indices)


def test_is_the_mean_over_every_example_once(whole, alone):
    """Padded to twelve: one counted twice or missed would move the mean."""
    np.testing.assert_allclose(whole.value, alone.mean(), rtol=1e-4)
    np.testing.assert_allclose(whole.standard_error, alone.std(ddof=1) / SIZE**0.5, rtol=1e-3)


def test_some_are_the_first_of_a_fixed_order(trained, source, alone, tmp_path):
    reads = Reads(source)
    some = measure_nll(trained, reads, "heldout", 5, 4, tmp_path)
    first = list(itertools.chain(*reads.reads))[:5]
    assert sorted(first) != first, "picked at random"
    np.testing.assert_allclose(some.value, alone[first].mean(), rtol=1e-4)


def test_one_example_has_no_standard_error(trained, source, tmp_path):
    assert measure_nll(trained, source, "heldout", 1, 4, tmp_path).standard_error == 0


def test_batches_and_devices_do_not_matter(trained, source, whole, tmp_path, monkeypatch):
    mesh = make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(module, "make_mesh", lambda: mesh)
    other = measure_nll(trained, source, "heldout", SIZE, 5, tmp_path)
    np.testing.assert_allclose(other, whole, atol=1e-3)


def test_goes_on_where_it_was_stopped(trained, source, whole, tmp_path):
    allowed = iter(range(2))

    def poll():
        if next(allowed, None) is None:
            raise Stopped("SIGTERM")

    first, rest = Reads(source), Reads(source)
    with pytest.raises(Stopped):
        measure_nll(trained, first, "heldout", SIZE, 4, tmp_path, poll)
    nll = measure_nll(trained, rest, "heldout", SIZE, 4, tmp_path)
    assert (len(first.reads), len(rest.reads)) == (2, 1)
    assert nll == whole


def test_gaussian_data_costs_its_cross_entropy(source, tmp_path):
    """The density at the least noisy time and the moments of the levels give it, in float32."""
    trained = make_trained(source, gaussian, process__num_timesteps=100)
    nll = measure_nll(trained, source, "heldout", SIZE, 4, tmp_path)
    x0 = source.batch("heldout", np.arange(SIZE))["image"] / 8.0 - 1
    alpha_bar, width = 1 - trained.model.process.betas[0], 1 / 8
    var = alpha_bar * STD**2 + 1 - alpha_bar
    moment = np.mean((x0 - alpha_bar**0.5 * MEAN) ** 2) + width**2 / 12
    expected = (np.log(2 * np.pi * var) + moment / var) / 2 - np.log(width)
    # u moves log p(x + u) by (x - mean)·u/var.
    error = width / np.sqrt(12) / STD / np.log(2) / np.sqrt(x0.size)
    np.testing.assert_allclose(nll.value, expected / np.log(2), atol=5 * error)


def test_labels_reach_a_conditional_model_alone(source, tmp_path):
    given = []

    def denoiser(process):
        def run(xt, t, conditioning):
            given.append(set(conditioning))
            return gaussian(process)(xt, t, {})

        return jax.tree_util.Partial(run)

    for conditional in (True, False):
        fields = {"model__class_conditional": conditional}
        trained = make_trained(source, denoiser, **fields)
        measure_nll(trained, source, "heldout", 4, 4, tmp_path / str(conditional))
        assert given.pop() == ({"label"} if conditional else set())
        given.clear()


def test_what_is_not_finite_is_one_line(source, tmp_path):
    def broken(process):
        return GaussianDenoiser(jnp.nan, STD**2, process)

    with pytest.raises(UserError, match="log-likelihoods are not finite"):
        measure_nll(make_trained(source, broken), source, "heldout", 4, 4, tmp_path)


def test_record_says_how_it_was_measured(trained, source, whole, tmp_path):
    what = Evaluation(tmp_path / "cache", trained, source, batch_size=4)
    report = evaluate(what, ["nll"], tmp_path)
    path = report.path
    assert path.name.startswith("nll_")
    assert str(report).splitlines()[1].startswith("nll")
    found = load_record(path)["measured"]["nll"]
    assert found["result"] == {
        "value": whole.value,
        "standard_error": whole.standard_error,
        "unit": "bits/dim",
    }
    assert found["protocol"] == {
        "data": source.spec.identity,
        "split": "heldout",
        "num_examples": SIZE,
        "num_levels": LEVELS,
        "given": "label",
        "divergence": "hutchinson",
        "draws": 1,
        "rtol": 1e-5,
        "atol": 1e-5,
    }
