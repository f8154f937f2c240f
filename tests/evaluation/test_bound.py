"""Bits/dim of a model over a split: nothing counted twice or left out, and known exactly."""

import csv
import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from exact import GaussianDenoiser
from PIL import Image
from scipy.stats import norm

from jax_ddpm.codecs.pixels import Pixels
from jax_ddpm.data.source import ArraySource
from jax_ddpm.diffusion.likelihood import variational_bound
from jax_ddpm.diffusion.parameterisation import Prediction
from jax_ddpm.diffusion.process import Process, expand, per_example_normal
from jax_ddpm.errors import UserError
from jax_ddpm.evaluation import result_cache, split_terms
from jax_ddpm.evaluation.bound import Bound, measure_bound, reduce_terms, write_curve
from jax_ddpm.inference.trained import Trained
from jax_ddpm.keys import Stream, stream_key
from jax_ddpm.runtime.devices import make_mesh
from jax_ddpm.runtime.stopping import Stopped

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

SHAPE, LEVELS, SIZE = (4, 4, 1), 17, 23


def make_source(num_levels=LEVELS, size=SIZE, seed=0, images=None):
    """Random images, of which ``size`` are held out."""
    rng = np.random.default_rng(seed)

    def split(count):
        levels = rng.integers(0, num_levels, (count, *SHAPE), dtype=np.uint8)
        return {"image": levels, "label": (np.arange(count) % 3).astype(np.int32)}

    splits = {"train": split(9), "heldout": split(size)}
    if images is not None:
        splits["heldout"]["image"] = images
    return ArraySource(splits, num_levels, f"random {seed}")


def make_trained(source, seed=0, denoiser=None, **fields):
    """A model with a network of a few parameters, or with ``chain → denoiser`` in its place."""
    config = tiny.config(**({"model__class_conditional": True} | fields))
    network = tiny.network(1, 3)
    params = jax.tree.map(np.asarray, network.init(jax.random.key(seed)))
    trained = Trained(config, source.spec, 0, "ema", params)
    trained.model.network = network
    if denoiser:
        exact = denoiser(trained.model.chain)
        trained.model.denoiser = lambda *_: exact
    return trained


@pytest.fixture(scope="module")
def source():
    return make_source()


@pytest.fixture(scope="module")
def trained(source):
    return make_trained(source)


@pytest.fixture
def over(monkeypatch):
    """``over(n)`` makes the mesh of n devices."""

    def change(num_devices):
        mesh = make_mesh(devices=jax.devices()[:num_devices])
        monkeypatch.setattr(split_terms, "make_mesh", lambda: mesh)

    return change


class Reads:
    """A source that notes which examples are read, and fails at read number ``fails``."""

    def __init__(self, source, fails=None, error=KeyboardInterrupt):
        self.spec, self.reads = source.spec, []
        self._source, self._fails, self._error = source, fails, error

    def batch(self, split, indices):
        if len(self.reads) == self._fails:
            raise self._error
        self.reads.append(indices.tolist())
        return self._source.batch(split, indices)


def values(bound):
    """Every number of a bound, in one row."""
    fields = (getattr(bound, field.name) for field in dataclasses.fields(bound))
    return np.concatenate([np.ravel(field) for field in fields])


@pytest.fixture(scope="module")
def whole(trained, source, tmp_path_factory):
    """The result over all held-out examples, in batches of four."""
    return measure_bound(trained, source, "heldout", SIZE, 4, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def matrix(trained, source):
    """The terms of every held-out example by its place in the split, one example at a time."""
    model, key = trained.model, stream_key(jax.random.key(0), Stream.BOUND)
    params = jax.tree.map(jnp.asarray, trained.params)

    @jax.jit
    def alone(place, batch):
        x0 = Pixels((), LEVELS).encode(batch)
        keys = jax.random.fold_in(key, place)[None]
        denoiser, given = model.denoiser(params), {"label": batch["label"]}
        return variational_bound(model.chain, denoiser, x0, keys, given, model.variance, LEVELS)

    rows = [alone(i, source.batch("heldout", np.array([i]))) for i in range(SIZE)]
    stacked = jax.tree.map(lambda *leaves: np.concatenate(leaves).astype(float), *rows)
    return stacked._asdict()


def literal(terms):
    """The reduction as one would write it down, from [example, T]: bits/dim and RMSE."""
    steps, prior = terms["steps"] / np.log(2), terms["prior"] / np.log(2)
    rate = steps[:, 1:].sum(axis=1) + prior
    columns = {"total": steps.sum(axis=1) + prior, "prior": prior, "rate": rate}
    columns |= {"distortion": steps[:, 0]}

    def error(column):
        return np.std(column, axis=0, ddof=1) / np.sqrt(len(column))

    row = [len(steps)]
    for column in columns.values():
        row += [column.mean(), error(column)]
    return np.concatenate(
        [row, steps.mean(0), error(steps), 127.5 * np.sqrt(terms["x0_mse"].mean(0))]
    )


class TestSplit:
    def test_is_the_mean_over_every_example_once(self, whole, matrix):
        """Padded to 24 examples: one counted twice or missed would move a mean by a 23rd."""
        assert whole.count == SIZE
        np.testing.assert_allclose(values(whole), literal(matrix), rtol=1e-4)

    def test_reads_each_example_once_but_for_padding(self, trained, source, tmp_path):
        reads = Reads(source)
        measure_bound(trained, reads, "heldout", SIZE, 4, tmp_path)
        read = list(itertools.chain(*reads.reads))
        assert len(read) == 24
        assert sorted(read[:SIZE]) == list(range(SIZE))
        assert read[SIZE] == read[SIZE - 1]

    @pytest.mark.slow
    @pytest.mark.parametrize(("batch_size", "num_devices"), [(5, 4), (23, 1), (64, 4)], ids=str)
    def test_batches_and_devices_do_not_matter(
        self, trained, source, whole, over, tmp_path, batch_size, num_devices
    ):
        over(num_devices)
        other = measure_bound(trained, source, "heldout", SIZE, batch_size, tmp_path)
        np.testing.assert_allclose(values(other), values(whole), rtol=1e-4)

    def test_again_it_is_the_same_to_the_last_bit(self, trained, source, whole, tmp_path):
        again = measure_bound(trained, source, "heldout", SIZE, 4, tmp_path)
        np.testing.assert_array_equal(values(again), values(whole))

    @pytest.mark.parametrize("count", [2, 9])
    def test_some_are_the_first_of_a_fixed_order(self, trained, source, matrix, tmp_path, count):
        """Their terms are those in the whole, whatever was measured before."""
        reads = Reads(source)
        measure_bound(trained, reads, "heldout", SIZE, 4, tmp_path / "whole")
        order = list(itertools.chain(*reads.reads))[:SIZE]
        expected = literal({name: terms[order[:count]] for name, terms in matrix.items()})
        assert sorted(order) != order, "picked at random"
        for cache in (tmp_path / "whole", tmp_path / "alone"):
            some = measure_bound(trained, source, "heldout", count, 4, cache)
            np.testing.assert_allclose(values(some), expected, rtol=1e-4, atol=1e-5)

    def test_more_than_there_are_is_all(self, trained, source, whole, tmp_path):
        bound = measure_bound(trained, source, "heldout", 1000, 4, tmp_path)
        np.testing.assert_array_equal(values(bound), values(whole))

    def test_the_other_split(self, trained, source, whole, tmp_path):
        bound = measure_bound(trained, source, "train", 1000, 4, tmp_path)
        assert bound.count == 9
        assert bound.total.value != whole.total.value


class TestCache:
    """One folder for everything that is measured: nothing is taken for something else."""

    @pytest.fixture(scope="class")
    @staticmethod
    def cache(trained, source, tmp_path_factory):
        cache = tmp_path_factory.mktemp("cache")
        measure_bound(trained, source, "heldout", SIZE, 4, cache)
        return cache

    def test_holds_what_was_measured(self, trained, source, whole, cache):
        reads = Reads(source)
        bound = measure_bound(trained, reads, "heldout", 9, 4, cache)
        assert not reads.reads
        assert bound.count == 9
        again = measure_bound(trained, reads, "heldout", SIZE, 4, cache)
        np.testing.assert_array_equal(values(again), values(whole))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "changed",
        [
            {"seed": 1},
            {"sampling__clip": False},
            {"parameterisation__variance": "fixedsmall"},
            {"process__num_timesteps": 7},
        ],
        ids=str,
    )
    def test_is_not_another_models(self, source, whole, cache, tmp_path, changed):
        other = make_trained(source, **changed)
        bounds = [measure_bound(other, source, "heldout", SIZE, 4, c) for c in (cache, tmp_path)]
        np.testing.assert_array_equal(*map(values, bounds))
        assert np.all(values(bounds[0])[[1, 5]] != values(whole)[[1, 5]])

    def test_is_not_that_of_other_data(self, trained, whole, cache):
        bound = measure_bound(trained, make_source(seed=1), "heldout", SIZE, 4, cache)
        assert bound.total.value != whole.total.value

    def test_does_not_mind_how_the_model_is_sampled(self, source, whole, cache):
        """The bound is the conditional model's over the whole chain."""
        fields = {"sampling__guidance_scale": 3.0, "sampling__num_steps": 2}
        other = make_trained(source, **fields)
        for reads in (Reads(source), Reads(source, fails=0)):
            bound = measure_bound(other, reads, "heldout", SIZE, 4, cache)
            np.testing.assert_array_equal(values(bound), values(whole))

    def test_nor_is_a_guided_model_measured_guided(self, source, whole, tmp_path):
        other = make_trained(source, sampling__guidance_scale=3.0, sampling__num_steps=2)
        bound = measure_bound(other, source, "heldout", SIZE, 4, tmp_path)
        np.testing.assert_array_equal(values(bound), values(whole))


class TestKilled:
    """A measurement in six batches, killed and repeated."""

    def stored(self, cache):
        return len(list(cache.rglob("*.npz")))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("error", "at"), [(MemoryError, 0), (KeyboardInterrupt, 1), (Stopped, 3), (SystemExit, 5)]
    )
    def test_while_reading(self, trained, source, whole, tmp_path, error, at):
        with pytest.raises(error):
            measure_bound(trained, Reads(source, at, error), "heldout", SIZE, 4, tmp_path)
        stored = self.stored(tmp_path)
        assert stored == max(0, at - 1)
        rest = Reads(source)
        bound = measure_bound(trained, rest, "heldout", SIZE, 4, tmp_path)
        assert len(rest.reads) == 6 - stored
        np.testing.assert_array_equal(values(bound), values(whole))

    @pytest.mark.parametrize("polls", [0, 1, 5])
    def test_when_asked_to_stop(self, trained, source, whole, tmp_path, polls):
        """The batch under way is kept, so that each is computed once in all."""
        allowed = iter(range(polls))

        def poll():
            if next(allowed, None) is None:
                raise Stopped("SIGTERM")

        first, rest = Reads(source), Reads(source)
        with pytest.raises(Stopped):
            measure_bound(trained, first, "heldout", SIZE, 4, tmp_path, poll)
        assert self.stored(tmp_path) == len(first.reads) == polls
        bound = measure_bound(trained, rest, "heldout", SIZE, 4, tmp_path)
        assert len(rest.reads) == 6 - polls
        np.testing.assert_array_equal(values(bound), values(whole))

    def test_while_writing(self, trained, source, whole, tmp_path, monkeypatch):
        """Half of a file is no part."""
        calls, write = [], np.savez

        def half(file, **arrays):
            calls.append(file)
            write(file, **arrays)
            if len(calls) == 3:
                file.truncate(file.tell() // 2)
                raise SystemExit

        with monkeypatch.context() as patch:
            patch.setattr(result_cache.np, "savez", half)
            with pytest.raises(SystemExit):
                measure_bound(trained, source, "heldout", SIZE, 4, tmp_path)
        assert self.stored(tmp_path) == 2
        bound = measure_bound(trained, source, "heldout", SIZE, 4, tmp_path)
        np.testing.assert_array_equal(values(bound), values(whole))

    def test_a_damaged_part_is_named_and_computed_again(self, trained, source, tmp_path):
        expected = measure_bound(trained, source, "heldout", SIZE, 4, tmp_path)
        path = sorted(tmp_path.rglob("*.npz"))[2]
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.warns(UserWarning, match=f"^{path} is damaged; computing it again$"):
            found = measure_bound(trained, source, "heldout", SIZE, 4, tmp_path)
        assert found.total == expected.total


def test_labels_reach_a_conditional_model_alone(source, tmp_path):
    given = []

    def denoiser(chain):
        def run(xt, t, conditioning):
            given.append(set(conditioning))
            return GaussianDenoiser(0.0, 0.1, chain)(xt, t, {})

        return jax.tree_util.Partial(run)

    for conditional in (True, False):
        fields = {"model__class_conditional": conditional}
        trained = make_trained(source, denoiser=denoiser, **fields)
        measure_bound(trained, source, "heldout", 4, 4, tmp_path / str(conditional))
        assert given.pop() == ({"label"} if conditional else set())
        given.clear()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clock:
    """Predicts at every t a grey level of its own: its bound is the same for whatever noise."""

    process: Process = dataclasses.field(metadata={"static": True})

    def __call__(self, xt, t, conditioning):
        grey = 0.8 - 0.2 * expand(t, xt)
        alpha, sigma = expand(self.process.alpha(t), xt), expand(self.process.sigma(t), xt)
        return Prediction(grey + jnp.zeros_like(xt), (xt - alpha * grey) / sigma)


class TestSemantics:
    @pytest.mark.parametrize(
        ("num_levels", "variance"), [(2, "fixedsmall"), (17, "fixedlarge"), (256, "fixedsmall")]
    )
    def test_every_number_of_a_prediction_that_depends_on_t_alone(
        self, tmp_path, num_levels, variance
    ):
        """Each term is at its place, in its unit, at any number of levels."""
        source = make_source(num_levels)
        trained = make_trained(source, denoiser=Clock, parameterisation__variance=variance)
        bound = measure_bound(trained, source, "heldout", SIZE, 8, tmp_path)

        levels = source.batch("heldout", np.arange(SIZE))["image"].reshape(SIZE, -1)
        x0 = levels / (num_levels - 1) * 2.0 - 1
        betas = trained.model.chain.betas
        alpha_bar = np.cumprod(1 - betas)
        before = np.append(1, alpha_bar[:-1])
        grey = 0.8 - 0.2 * np.arange(8)
        mse = np.mean((x0[:, None] - grey[:, None]) ** 2, axis=2)
        smallest = betas * (1 - before) / (1 - alpha_bar)
        used = smallest if variance == "fixedsmall" else betas
        ratio = smallest[1:] / used[1:]
        shift = before[1:] * (betas / (1 - alpha_bar))[1:] ** 2 * mse[:, 1:] / used[1:]
        kl = (ratio - 1 - np.log(ratio) + shift) / 2
        half, std = 1 / (num_levels - 1), np.sqrt(smallest[1])
        upper = np.where(levels == num_levels - 1, np.inf, x0 + half - 0.8) / std
        lower = np.where(levels == 0, -np.inf, x0 - half - 0.8) / std
        # Mirrored to the left tail, where differences of probabilities keep their precision.
        upper, lower = np.where(lower > 0, (-lower, -upper), (upper, lower))
        high, low = norm.logcdf(upper), norm.logcdf(lower)
        decoder = -np.mean(high + np.log1p(-np.exp(low - high)), axis=1, keepdims=True)
        end = alpha_bar[-1]
        prior = (end * (np.mean(x0**2, axis=1) - 1) - np.log1p(-end)) / 2

        steps = np.concatenate([decoder, kl], axis=1)
        expected = literal({"steps": steps, "prior": prior, "x0_mse": mse})
        np.testing.assert_allclose(values(bound), expected, rtol=2e-4, atol=1e-6)

    def test_rate_and_distortion_along_t(self, whole):
        """The point at t: what was received before x_t, and its cost; all except L_0 at t = 0."""
        steps, prior = whole.steps, whole.prior.value
        expected = [prior + sum(steps[s] for s in range(t + 1, 8)) for t in range(8)]
        np.testing.assert_allclose(whole.cumulative_rate, expected, rtol=1e-12)
        np.testing.assert_allclose(whole.cumulative_rate[0], whole.rate.value, rtol=1e-12)
        assert whole.cumulative_rate[-1] == prior
        total = whole.rate.value + whole.distortion.value
        np.testing.assert_allclose(whole.total.value, total, rtol=1e-12)
        np.testing.assert_allclose(whole.distortion, [steps[0], whole.steps_error[0]])


STD, COUNT = 0.25, 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OptimalDenoiser:
    """Exact for N(0, s²), with the fraction that makes σ² = β̃ + c_0²·Var(x_0 | x_t)."""

    process: Process = dataclasses.field(metadata={"static": True})

    def __call__(self, xt, t, conditioning):
        chain = self.process
        unknown = STD**2 * chain.one_minus_alpha_bar / (chain.alpha_bar * (STD**2 - 1) + 1)
        optimal = chain.posterior.variance + chain.posterior.coef_x0**2 * unknown
        smallest = chain.posterior_log_variance
        fraction = (np.log(optimal) - smallest) / (np.log(chain.betas) - smallest)
        fraction = expand(chain.gather(fraction, t), xt) + jnp.zeros_like(xt)
        exact = GaussianDenoiser(0.0, STD**2, chain)(xt, t, conditioning)
        return exact._replace(variance_fraction=fraction)


@pytest.mark.slow
class TestGaussianData:
    """N(0, s²) rounded to 256 levels."""

    @pytest.fixture(scope="class")
    @staticmethod
    def data():
        x0 = np.random.default_rng(1).normal(0, STD, (COUNT, *SHAPE))
        return make_source(256, COUNT, images=np.rint((x0.clip(-1, 1) + 1) * 127.5).astype("uint8"))

    def measure(self, data, tmp_path, denoiser, variance):
        fields = {"process__name": "linear", "process__num_timesteps": 100}
        trained = make_trained(data, denoiser=denoiser, **fields)
        trained.model.family = dataclasses.replace(trained.model.family, variance=variance)
        bound = measure_bound(trained, data, "heldout", COUNT, 100, tmp_path)
        x0 = data.batch("heldout", np.arange(COUNT))["image"] / 127.5 - 1
        return bound, trained.model.chain, x0

    def test_the_exact_model_needs_the_entropy(self, data, tmp_path):
        bound, _, x0 = self.measure(data, tmp_path, OptimalDenoiser, "learned")
        upper = np.where(x0 == 1, np.inf, x0 + 1 / 255) / STD
        lower = np.where(x0 == -1, -np.inf, x0 - 1 / 255) / STD
        entropy = -np.mean(np.log2(norm.cdf(upper) - norm.cdf(lower)))
        value, error = bound.total
        assert error < 0.04, "sharp enough to tell: β̃ exceeds by 1.4, β by 0.14"
        assert abs(value - entropy) < 4 * error + 1e-4

    def test_terms_follow_their_expectation(self, data, tmp_path):
        """A linear x̂_0 = g·x_t errs by (1-g·√ᾱ)²·x_0² + g²·(1-ᾱ), and the KL is c_0²/(2β̃) of it.

        Each within five of its standard errors, and of those of a mean of squares.
        """
        exact = partial(GaussianDenoiser, 0.0, STD**2)
        bound, chain, x0 = self.measure(data, tmp_path, exact, "fixedsmall")
        alpha_bar = np.cumprod(1 - chain.betas)
        noise = 1 - alpha_bar
        gain = np.sqrt(alpha_bar) * STD**2 / (alpha_bar * STD**2 + noise)
        mse = (1 - gain * np.sqrt(alpha_bar)) ** 2 * np.mean(x0**2) + gain**2 * noise
        of_a_mean = 5 * np.sqrt(2 / x0.size)
        np.testing.assert_allclose(bound.rmse, 127.5 * np.sqrt(mse), rtol=of_a_mean / 2)
        before = np.append(1, alpha_bar[:-1])
        smallest = (chain.betas * (1 - before) / noise)[1:]
        kl = before[1:] * (chain.betas / noise)[1:] ** 2 * mse[1:] / (2 * smallest) / np.log(2)
        np.testing.assert_allclose(bound.steps[1:], kl, rtol=of_a_mean)
        assert np.max(np.abs(bound.steps[1:] - kl) / bound.steps_error[1:]) < 5
        prior = (alpha_bar[-1] * (np.mean(x0**2) - 1) - np.log1p(-alpha_bar[-1])) / 2 / np.log(2)
        np.testing.assert_allclose(bound.prior.value, prior, rtol=1e-4)
        later = prior + np.array([kl[t:].sum() for t in range(100)])
        np.testing.assert_allclose(bound.cumulative_rate, later, rtol=of_a_mean)


class TestReduction:
    """The reduction against one over the whole matrix at once."""

    def terms(self, rng, count=37, offset=0.0, num_timesteps=6):
        shape = count, num_timesteps
        steps, prior = offset + rng.gamma(2, 3, shape), offset + rng.gamma(2, 3, count)
        return {"steps": steps, "prior": prior, "x0_mse": rng.gamma(2, 3, shape)}

    def split(self, terms, *ends):
        names = list(terms)
        cut = [np.split(terms[name], ends) for name in names]
        return [dict(zip(names, part, strict=True)) for part in zip(*cut, strict=True)]

    @pytest.mark.parametrize("ends", [(), (5,), (1, 2, 30), (36,)], ids=str)
    def test_is_the_literal_one_however_split(self, rng, ends):
        terms = self.terms(rng)
        bound = reduce_terms(self.split(terms, *ends), 37)
        np.testing.assert_allclose(values(bound), literal(terms), rtol=1e-12)

    @pytest.mark.parametrize("count", [2, 10, 11, 30, 36])
    def test_takes_the_first_and_no_more(self, rng, count):
        terms = self.terms(rng)
        bound = reduce_terms(self.split(terms, 10, 30), count)
        expected = literal({name: array[:count] for name, array in terms.items()})
        np.testing.assert_allclose(values(bound), expected, rtol=1e-10)

    @pytest.mark.parametrize("offset", [1e3, 1e6, 1e9])
    def test_large_terms_keep_their_standard_errors(self, rng, offset):
        """Σx² - (Σx)²/n would lose them."""
        terms = self.terms(rng, offset=offset)
        bound = reduce_terms(self.split(terms, 10, 30), 37)
        np.testing.assert_allclose(values(bound), literal(terms), rtol=1e-4)

    def test_of_float32_terms_is_in_float64(self, rng):
        terms = {k: v.astype(np.float32) for k, v in self.terms(rng, count=4000).items()}
        exact = {name: array.astype(np.float64) for name, array in terms.items()}
        bound = reduce_terms(self.split(terms, 1000, 3000), 4000)
        np.testing.assert_allclose(values(bound), literal(exact), rtol=1e-10)

    def test_of_one_example_is_its_terms(self, rng):
        terms = self.terms(rng, count=1)
        bound = reduce_terms([terms], 1)
        assert bound.count == 1
        np.testing.assert_allclose(bound.steps, terms["steps"][0] / np.log(2))
        np.testing.assert_allclose(bound.rmse, 127.5 * np.sqrt(terms["x0_mse"][0]))
        total = (terms["steps"].sum() + terms["prior"][0]) / np.log(2)
        np.testing.assert_allclose(bound.total.value, total)

    @pytest.mark.parametrize("name", ["steps", "prior", "x0_mse"])
    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_is_refused_where_a_term_is_not_finite(self, rng, name, bad):
        """A model that has diverged has no bits/dim, and JSON no NaN; what is left out may."""
        terms = self.terms(rng)
        terms[name][36:] = bad
        with pytest.raises(UserError, match="not finite"):
            reduce_terms(self.split(terms, 10, 30), 37)
        assert np.all(np.isfinite(values(reduce_terms(self.split(terms, 10, 30), 36))))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


class TestCurve:
    def read(self, path):
        with path.open(newline="") as file:
            header, *rows = csv.reader(file)
        return header, np.array(rows, float)

    def test_csv_holds_the_arrays_noisiest_first(self, whole, tmp_path):
        write_curve(whole, tmp_path / "folder" / "bpd")
        header, rows = self.read(tmp_path / "folder" / "bpd.csv")
        assert header == ["t", "term", "term_standard_error", "rate", "rmse"]
        columns = (whole.steps, whole.steps_error, whole.cumulative_rate, whole.rmse)
        np.testing.assert_array_equal(rows[::-1].T, [np.arange(8), *columns])
        assert rows[0, 0] == 7
        assert np.all(np.diff(rows[:, 3]) >= 0), "received in this order"

    def test_plot_is_a_png(self, whole, tmp_path):
        write_curve(whole, tmp_path / "bpd")
        with Image.open(tmp_path / "bpd.png") as image:
            assert image.format == "PNG"
            assert len(np.unique(np.asarray(image.convert("L")))) > 2, "something is drawn"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bpd.csv", "bpd.png"]

    def test_names_with_dots_are_kept(self, whole, tmp_path):
        """Two records, --out=run.1.json and --out=run.2.json, have a curve each."""
        write_curve(whole, tmp_path / "run.1")
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["run.1.csv", "run.1.png"]


def test_noise_is_not_that_of_training_or_sampling(trained, source, tmp_path):
    """x_t as the denoiser sees them hold the noise of the bound's own stream."""
    seen = []

    def denoiser(chain):
        def run(xt, t, conditioning):
            jax.debug.callback(lambda *pair: seen.append(pair), xt, t)
            return GaussianDenoiser(0.0, 0.1, chain)(xt, t, {})

        return jax.tree_util.Partial(run)

    spied = make_trained(source, denoiser=denoiser)
    reads = Reads(source)
    measure_bound(spied, reads, "heldout", 4, 4, tmp_path)
    jax.effects_barrier()
    (index,) = reads.reads
    x0 = Pixels((), LEVELS).encode(source.batch("heldout", np.array(index)))
    key = stream_key(jax.random.key(0), Stream.BOUND)
    places = jnp.asarray(index)
    keys = jax.vmap(partial(jax.random.fold_in, key))(places)
    alpha_bar = np.cumprod(1 - spied.model.chain.betas)
    assert len(seen) == 8
    for xt, t in seen:
        whole_t = int(t[0])
        of_t = jax.vmap(lambda key, step=whole_t: jax.random.fold_in(key, step))(keys)
        noise = np.sqrt(1 - alpha_bar[whole_t]) * per_example_normal(of_t, x0)
        np.testing.assert_allclose(xt, np.sqrt(alpha_bar[whole_t]) * x0 + noise, atol=1e-5)


def test_is_what_it_says(whole):
    assert isinstance(whole, Bound)
    assert whole.steps.shape == whole.steps_error.shape == whole.rmse.shape == (8,)
