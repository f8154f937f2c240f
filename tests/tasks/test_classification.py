"""The classifiers' objectives by hand, and their training through the one loop."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jax_ddpm import factory
from jax_ddpm.diffusion.chain import Chain
from jax_ddpm.diffusion.parameterisation import Parameterisation
from jax_ddpm.diffusion.schedules import make_betas
from jax_ddpm.diffusion.time_sampling import LossSecondMoment, Stratified, Uniform
from jax_ddpm.keys import StepKeys, Stream
from jax_ddpm.runs import checkpoint
from jax_ddpm.runtime.stopping import Stopped
from jax_ddpm.tasks.classification import (
    ClassificationObjective,
    NoisyClassificationObjective,
)
from jax_ddpm.tasks.recipe import one_network
from jax_ddpm.tasks.table import make_model
from jax_ddpm.training.compiled_step import compile_step
from jax_ddpm.training.layout import spread
from jax_ddpm.training.loop import train
from jax_ddpm.training.preflight import Preflight
from jax_ddpm.training.prepare import initial_parameters
from jax_ddpm.training.state import init_state

SIZE = 6
CHAIN = Chain(make_betas("cosine", 8))
FIELDS = {
    "task": "classification",
    "data__flip": True,
    "data__shift": 1,
    "model__base_channels": 4,
    "model__attention_resolutions": (),
    "training__learning_rate": 0.03,
    "training__num_steps": 40,
    "training__batch_size": 32,
    "training__log_every": 15,
    "training__heldout_every": 20,
    "training__sample_every": 10,
    "training__checkpoint_every": 20,
}


def linear(params, x, dropout_keys=None, time=None):
    """Class i has the logit of pixel i, halved where there are keys to drop units out by.

    The time, if any, is added to the first.
    """
    features = x.reshape(len(x), -1)
    logits = params["gain"] * features[:, :3]
    if time is not None:
        logits = logits.at[:, 0].add(params["gain"] * time)
    return features, logits if dropout_keys is None else logits / 2


@pytest.fixture
def keys():
    return StepKeys(jax.random.key(3), jnp.array(5), jnp.arange(SIZE), SIZE)


@pytest.fixture
def objective():
    return ClassificationObjective(linear, flip=True, shift=1)


@pytest.fixture
def noisy():
    """The objective on the noise of eight steps, at times that the network sees in other units."""
    parameterisation = Parameterisation(CHAIN, time_scale=0.07, data_std=0.5, normalise_input=True)
    return NoisyClassificationObjective(
        linear,
        flip=True,
        shift=1,
        parameterisation=parameterisation,
        time_sampler=Uniform(8),
    )


@pytest.fixture(params=["clean", "noisy"])
def either(request, objective, noisy):
    return objective if request.param == "clean" else noisy


@pytest.fixture
def batch():
    return jax.tree.map(jnp.asarray, tiny.batch(tiny.spec(), SIZE))


def test_measures_the_cross_entropy_and_who_is_right(objective, keys, batch):
    measured = objective.measuring()
    loss, metrics, extra = jax.jit(measured)(
        {"codec": tiny.CODEC, "network": {"gain": jnp.array(3.0)}},
        measured.init(),
        batch,
        keys,
        keys.step,
    )
    pixels = np.asarray(batch["image"], float).reshape(SIZE, -1) / 16 * 2 - 1
    odds = np.exp(3 * pixels[:, :3])
    probability = (odds / odds.sum(axis=1, keepdims=True))[np.arange(SIZE), batch["label"]]
    np.testing.assert_allclose(loss, -np.log(probability), rtol=1e-5)
    right, weights = metrics["accuracy"]
    assert right.tolist() == [*(odds.argmax(axis=1) == batch["label"])]
    assert weights.all()
    assert extra == ()


def test_ignorance_costs_the_logarithm_of_the_number_of_classes(objective, keys, batch):
    loss, _, _ = objective(
        {"codec": tiny.CODEC, "network": {"gain": jnp.zeros(())}}, (), batch, keys, keys.step
    )
    np.testing.assert_allclose(loss, np.log(3), rtol=1e-6)


def loss_at(objective, keys, batch, step, **params):
    at = StepKeys(keys.seed, jnp.array(step), keys.index, SIZE)
    params = {"codec": tiny.CODEC, "network": {"gain": jnp.array(3.0)} | params}
    return np.asarray(objective(params, objective.init(), batch, at, at.step)[0])


def test_only_training_is_random(objective, keys, batch):
    at = partial(loss_at, keys=keys, batch=batch)
    assert np.any(at(objective, step=5) != at(objective, step=6))
    np.testing.assert_array_equal(*(at(objective.measuring(), step=step) for step in (5, 6)))


class TestNoisy:
    """The objective on x_t in place of x_0."""

    def test_is_the_cross_entropy_of_noisy_images(self, noisy, keys, batch):
        """Time, noise and the network's input are made by hand."""
        measured = noisy.measuring()
        params = {"codec": tiny.CODEC, "network": {"gain": jnp.array(3.0)}}
        loss, metrics, extra = jax.jit(measured)(params, measured.init(), batch, keys, keys.step)
        assert extra == ()
        t, _ = Stratified(8).draw(
            (), keys.step, keys.shared(Stream.TIME), None, jnp.arange(SIZE) / SIZE
        )
        noise = jax.vmap(lambda key: jax.random.normal(key, (4, 4, 1)))(
            keys.per_example(Stream.NOISE)
        )
        alpha_bar = np.cumprod(1 - CHAIN.betas)[np.asarray(t, int)]
        x0 = np.asarray(batch["image"], float).reshape(SIZE, -1) / 16 * 2 - 1
        xt = np.sqrt(alpha_bar)[:, None] * x0
        xt += np.sqrt(1 - alpha_bar)[:, None] * np.asarray(noise).reshape(SIZE, -1)
        logits = 3 * (xt / np.sqrt(0.25 * alpha_bar + 1 - alpha_bar)[:, None])[:, :3]
        logits[:, 0] += 3 * 0.07 * np.asarray(t)
        odds = np.exp(logits)
        probability = (odds / odds.sum(axis=1, keepdims=True))[np.arange(SIZE), batch["label"]]
        np.testing.assert_allclose(loss, -np.log(probability), rtol=1e-4)
        right = odds.argmax(axis=1) == batch["label"]
        np.testing.assert_array_equal(metrics["accuracy"][0], right)
        for i in range(4):
            values, weights = metrics[f"accuracy_quarter{i + 1}"]
            np.testing.assert_array_equal(weights, np.asarray(t) // 2 == i)
            np.testing.assert_array_equal(values, right * np.asarray(weights))

    def test_without_noise_it_is_that_of_clean_images(self, objective, noisy, keys, batch):
        """A chain of almost no noise leads to almost no difference, also between their images."""
        with pytest.warns(UserWarning, match="leaves signal"):
            chain = Chain(np.full(8, 1e-9))
        quiet = dataclasses.replace(noisy, parameterisation=Parameterisation(chain, time_scale=0.0))
        expected = loss_at(objective, keys, batch, 5)
        np.testing.assert_allclose(loss_at(quiet, keys, batch, 5), expected, atol=2e-3)
        assert np.any(np.abs(loss_at(noisy, keys, batch, 5) - expected) > 0.1)

    def test_measuring_keeps_the_noise_and_nothing_else(self, noisy, keys, batch):
        at = partial(loss_at, keys=keys, batch=batch)
        assert np.any(at(noisy.measuring(), step=5) != at(noisy.measuring(), step=6))
        plain = dataclasses.replace(noisy, flip=False, shift=0).measuring()
        np.testing.assert_array_equal(at(noisy.measuring(), step=5), at(plain, step=5))

    def test_learns_by_its_gradient(self, noisy, keys, batch):
        """A step along it lowers the loss at the same noise."""

        def mean(gain):
            params = {"codec": tiny.CODEC, "network": {"gain": gain}}
            return jnp.mean(noisy(params, (), batch, keys, keys.step)[0])

        slope = jax.grad(mean)(jnp.array(3.0))
        assert slope != 0
        assert mean(3.0 - 1e-2 * slope) < mean(3.0)

    def test_importance_weighs_the_loss_that_the_time_sampler_learns_from(self, noisy, keys, batch):
        sampler = LossSecondMoment(8, length=1)
        weighted = dataclasses.replace(noisy, time_sampler=sampler)
        state = sampler.init()._replace(
            losses=jnp.arange(1.0, 9.0)[:, None], counts=jnp.ones(8, jnp.int32)
        )
        params = {"codec": tiny.CODEC, "network": {"gain": jnp.array(3.0)}}
        loss, _, new = weighted(params, state, batch, keys, keys.step)
        keys_of_time = keys.shared(Stream.TIME), keys.per_example(Stream.TIME)
        t, weight = sampler.draw(state, keys.step, *keys_of_time, jnp.arange(SIZE) / SIZE)
        t = np.asarray(t, int)
        last = {one: i for i, one in enumerate(t)}  # of several at one t the last is kept
        for one, i in last.items():
            np.testing.assert_allclose(new.losses[one, 0] * weight[i], loss[i], rtol=1e-5)


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_splitting_the_batch_changes_nothing(either, mesh_of, parallel):
    def run(num_devices, accumulate, parallel):
        mesh = mesh_of(num_devices)
        recipe = one_network(tiny.config(), tiny.network(), tiny.CODEC, either)._replace(
            accumulate=accumulate
        )
        params = {"codec": tiny.CODEC, "network": {"gain": jnp.array(3.0)}}
        state = spread(init_state(recipe, params), mesh)
        step = compile_step(recipe, state, mesh, parallel)
        batches = jax.tree.map(lambda x: x[None], tiny.batch(tiny.spec()))
        _, metrics = step(state, batches, jax.random.key(1))
        return jax.device_get(metrics)

    whole, split = run(1, 1, "jit"), run(4, 2, parallel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), split, whole)


class TestRun:
    """Training through the common loop, on the digits."""

    @pytest.fixture(scope="class")
    @staticmethod
    def run():
        def run(workdir, poll=lambda: None):
            return train(tiny.config(**FIELDS), workdir, poll=poll)

        return run

    @pytest.fixture(scope="class")
    @staticmethod
    def finished(run, tmp_path_factory):
        workdir = tmp_path_factory.mktemp("finished")
        assert run(workdir) == workdir / "checkpoints" / "40"
        return workdir

    @staticmethod
    def log(workdir):
        lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        return [line | {"images_per_second": None} for line in lines]

    def assert_same_run(self, one, other):
        assert self.log(one) == self.log(other)
        for item in ("params", "ema", "opt_state"):
            trees = [checkpoint.restore_item(workdir, 40, item) for workdir in (one, other)]
            jax.tree.map(np.testing.assert_array_equal, *trees)

    def test_learns(self, finished):
        """Guessing is right once in ten, so in 36 of 359 images, give or take 6."""
        measured = [line for line in self.log(finished) if "heldout_loss" in line]
        assert [line["step"] for line in measured] == [20, 40]
        assert measured[-1]["heldout_loss"] < measured[0]["heldout_loss"] < np.log(10)
        assert measured[-1]["heldout_accuracy"] > 0.2

    def test_draws_no_pictures(self, finished):
        assert not (finished / "samples").exists()

    def test_again_is_the_same_to_the_last_bit(self, run, finished, tmp_path):
        run(tmp_path)
        self.assert_same_run(tmp_path, finished)

    @pytest.mark.parametrize("call", [23, 42])
    def test_interrupted_is_the_same_to_the_last_bit(self, run, finished, tmp_path, call):
        """Interruptions come between steps, and in the last measurement on held-out images."""
        calls = iter(range(1, call))

        def poll():
            if next(calls, None) is None:
                raise Stopped

        with pytest.raises(Stopped):
            run(tmp_path, poll)
        run(tmp_path)
        self.assert_same_run(tmp_path, finished)

    def test_a_finished_run_stays_as_it_is(self, run, finished):
        before = self.log(finished)
        assert run(finished) == finished / "checkpoints" / "40"
        assert self.log(finished) == before

    def test_another_run_starts_from_it(self, finished, tmp_path):
        config = tiny.config(**FIELDS | {"init_from": str(finished)})
        network = make_model(config, factory.make_source(config).spec).network
        seed = jax.random.key(0)
        start, _ = initial_parameters(config, {"network": network}, seed, tmp_path)
        expected = checkpoint.restore_item(finished, 40, "ema")
        jax.tree.map(np.testing.assert_array_equal, start, expected)

    def test_is_checked_before_it_is_submitted(self, tmp_path, capsys):
        Preflight(tiny.config(**FIELDS), tmp_path).run()
        assert "FAILED" not in capsys.readouterr().out
