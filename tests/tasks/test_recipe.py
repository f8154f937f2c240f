"""Times are drawn as a config says, and each kind of process trains."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest
import tiny

from jax_ddpm.config.validation import validate
from jax_ddpm.data.source import ArraySource
from jax_ddpm.diffusion.time_densities import (
    Continuous,
    LogitNormalDensity,
    LogNormalDensity,
    UniformDensity,
)
from jax_ddpm.diffusion.time_sampling import LossSecondMoment, Stratified, Uniform
from jax_ddpm.errors import UserError
from jax_ddpm.factory import make_process, make_source, make_time_sampler
from jax_ddpm.tasks.recipe import check_recipe, make_phase
from jax_ddpm.tasks.table import make_recipe
from jax_ddpm.training.compiled_step import compile_step
from jax_ddpm.training.heldout import HeldOut
from jax_ddpm.training.layout import spread
from jax_ddpm.training.state import init_state

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("process", "name", "expected"),
    [
        ("cosine", "uniform", Uniform(8)),
        ("cosine", "stratified", Stratified(8)),
        ("cosine", "loss_second_moment", LossSecondMoment(8)),
        ("edm", "uniform", Continuous(UniformDensity(0.002, 80.0))),
        ("rectified_flow", "stratified", Continuous(UniformDensity(1e-5, 1.0), stratified=True)),
        ("edm", "log_normal", Continuous(LogNormalDensity(-0.4, 1.6))),
        ("ve", "logit_normal", Continuous(LogitNormalDensity(-0.4, 1.6))),
    ],
    ids=str,
)
def test_every_name_is_its_time_sampler(process, name, expected):
    """Chains have steps; other times reach over the process's range, or along the density given."""
    config = tiny.config(
        process__name=process,
        parameterisation__target="v",
        sampling__num_steps=4,
        loss__time_sampler=name,
        loss__time_mean=-0.4,
        loss__time_std=1.6,
    )
    validate(config, 1)
    actual = make_time_sampler(config, make_process(config))
    assert type(actual) is type(expected)
    assert actual == expected


def load(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize(
    "name", ["digits_v", "digits_edm", "digits_flow", "digits_self_conditioned", "digits_ve"]
)
def test_configs_of_the_digits_train(name, mesh_of):
    """A few steps on their data with a network of a few parameters, all finite, and each moves."""
    config = load(name)
    validate(config, 4)
    source = make_source(config)
    model = tiny.model(config, source.spec)
    recipe, mesh = make_recipe(config, model), mesh_of(4)
    params = {"network": model.network.init(jax.random.key(0))}
    state = spread(init_state(recipe, params), mesh)
    step, before = compile_step(recipe, state, mesh), jax.device_get(params)
    for i in range(3):
        batch = source.batch("train", np.arange(i, i + config.training.batch_size))
        batches = jax.tree.map(lambda x: x[None], batch)
        state, metrics = step(state, batches, jax.random.key(1))
        for value in jax.tree.leaves(jax.device_get(metrics)):
            assert np.all(np.isfinite(value))
    after = jax.device_get(state.params)
    moved = jax.tree.map(lambda a, b: np.any(a != b), before, after)
    assert all(jax.tree.leaves(moved))


CONTINUOUS = {
    "edm": {
        "process__name": "edm",
        "parameterisation__target": "edm",
        "loss__weighting": "target",
        "loss__time_sampler": "log_normal",
    },
    "rectified_flow": {
        "process__name": "rectified_flow",
        "parameterisation__target": "velocity",
        "loss__weighting": "target",
        "loss__time_sampler": "logit_normal",
    },
    "self_conditioned": {"model__self_condition": True, "parameterisation__target": "x0"},
}


@pytest.mark.parametrize("fields", CONTINUOUS.values(), ids=CONTINUOUS)
def test_held_out_loss_depends_on_parameters_alone(make_setting, mesh_of, fields):
    """The call, the batch size and the devices do not matter."""
    setting = make_setting(**fields)
    data = tiny.batch(setting.spec, 40)
    source = ArraySource({"train": data, "heldout": data}, num_levels=17, identity="tiny")
    params = {"network": setting.model.network.init(jax.random.key(0))}
    state = init_state(setting.recipe, params)

    def measure(batch_size, num_devices):
        mesh, seed = mesh_of(num_devices), jax.random.key(1)
        return HeldOut(setting.recipe, source, seed, mesh, batch_size, max_examples=40)

    whole = measure(40, 1)
    first = whole(state)
    assert whole(state) == first
    assert len(first) == 5
    split = measure(12, 4)(state)
    np.testing.assert_allclose([*split.values()], [*first.values()], rtol=1e-5)


class TestCheck:
    """A recipe whose parts do not fit each other is refused before anything is made of it."""

    @staticmethod
    def refused(recipe, said, serves="network"):
        with pytest.raises(UserError, match=f"^recipe: {said}"):
            check_recipe(recipe, serves)

    @pytest.fixture
    def recipe(self, make_setting):
        return make_setting().recipe

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"every": 0}, "phase network: every is 0; it must be a whole number, at least 1"),
            ({"every": 1.5}, "phase network: every is 1.5"),
            ({"trains": "network"}, "a phase trains 'network'; give names in a tuple"),
            ({"trains": ()}, r"a phase trains \(\)"),
            ({"trains": ("other",)}, "a phase trains 'other'; there are network"),
            ({"reads": ("codecc",)}, "phase network reads 'codecc'"),
            ({"objective": lambda *_: None}, "the objective of phase network is measured"),
        ],
    )
    def test_of_a_phase(self, recipe, changes, said):
        phase = recipe.phases[0]._replace(**changes)
        self.refused(recipe._replace(phases=(phase,)), said)

    def test_of_a_network_that_two_phases_train(self, recipe):
        said = "'network' is twice among its trained networks; one phase trains it"
        self.refused(recipe._replace(phases=recipe.phases * 2), said)

    @pytest.mark.parametrize("measured", [-1, 1])
    def test_of_the_phase_that_is_measured(self, recipe, measured):
        self.refused(recipe._replace(measured=measured), f"measured is {measured} of 1 phases")

    def test_of_averages(self, recipe):
        (average,) = recipe.averages.values()
        kept = {"network": average._replace(snapshot_every=-3)}
        self.refused(recipe._replace(averages=kept), "average network: snapshot_every is -3")
        self.refused(recipe._replace(averages={}), "the task serves the average 'network'")
        self.refused(recipe, "the task serves the average 'slow'; there are network", serves="slow")

    @pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
    def test_of_a_learning_rate(self, make_setting, rate):
        setting = make_setting()
        with pytest.raises(UserError, match=r"learning_rate=.*; it must be positive"):
            make_phase(setting.config, setting.objective, ("network",), learning_rate=rate)
