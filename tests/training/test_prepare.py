"""The parameters that training starts from: drawn, or those of another run."""

import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jax_ddpm.errors import UserError
from jax_ddpm.keys import Stream, stream_key
from jax_ddpm.models.network import Network
from jax_ddpm.runs.checkpoint import Checkpoints
from jax_ddpm.training.prepare import initial_parameters

SEED = jax.random.key(3)
NOWHERE = pathlib.Path("a workdir without checkpoints")


def make(make_setting, donor="", spec=None, workdir=NOWHERE):
    setting = make_setting(spec, init_from=str(donor))
    networks = {"network": setting.model.network}
    params, _ = initial_parameters(setting.config, networks, SEED, workdir)
    return params["network"]


@pytest.fixture(scope="module")
def averages(make_setting):
    """The averages by step."""
    network = make_setting().model.network
    return {step: network.init(jax.random.key(step)) for step in (1, 2)}


@pytest.fixture(scope="module")
def saved(make_setting, averages, tmp_path_factory):
    """A run with these averages in its checkpoints."""
    workdir = tmp_path_factory.mktemp("saved")
    with Checkpoints(workdir, keep_last=2, keep_every=0) as checkpoints:
        for step, params in averages.items():
            items = {"params": {"network": jnp.zeros(1)}, "ema": {"network": params}}
            checkpoints.save(step, items, make_setting().config, {})
    return workdir


@pytest.fixture
def run(saved, tmp_path):
    """A run to be damaged."""
    return shutil.copytree(saved, tmp_path / "run")


def damage(run, step, item):
    (run / "checkpoints" / str(step) / item / "_METADATA").unlink()


def assert_equal(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    for leaf in jax.tree.leaves(params):
        assert isinstance(leaf, jax.Array)
        assert not leaf.weak_type


def refuses(match, *arguments):
    with pytest.raises(UserError, match=match) as caught:
        make(*arguments)
    assert "\n" not in str(caught.value)


def test_are_drawn_from_the_seed(make_setting):
    network = make_setting().model.network
    assert_equal(make(make_setting), network.init(stream_key(SEED, Stream.PARAMETERS)))


def test_are_the_averages_of_another_run(make_setting, averages, saved):
    assert_equal(make(make_setting, saved), averages[2])


def test_are_not_looked_for_once_the_run_has_a_checkpoint(make_setting, saved):
    assert_equal(make(make_setting, "nowhere", workdir=saved), make(make_setting))


def test_relative_path(make_setting, averages, saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    assert_equal(make(make_setting, saved.name), averages[2])


def test_only_the_averages_must_be_whole(make_setting, averages, run):
    damage(run, 2, "params")
    assert_equal(make(make_setting, run), averages[2])
    damage(run, 2, "ema")
    with pytest.warns(UserWarning, match="checkpoint 2 is damaged: ema/_METADATA"):
        params = make(make_setting, run)
    assert_equal(params, averages[1])


@pytest.mark.parametrize("made", [False, True])
def test_a_run_that_is_not_there_is_one_line(make_setting, tmp_path, made):
    donor = tmp_path / "run"
    if made:
        donor.mkdir()
    refuses(f"^config.init_from={re.escape(str(donor))}: no checkpoint", make_setting, donor)


def test_another_network_is_one_line(make_setting, saved):
    line = rf"^config.init_from={saved} .*: bias is \(1, 1, 1, 1\), .*\(1, 1, 1, 3\)"
    refuses(line, make_setting, saved, tiny.spec((4, 4, 3)))


def test_a_damaged_run_is_one_line_naming_the_field(make_setting, run):
    for step in (1, 2):
        damage(run, step, "ema")
    with pytest.warns(UserWarning, match="is damaged"):
        refuses(f"^config.init_from={run}.* damaged", make_setting, run)


def save(workdir, **averages):
    """A run with these averages in its checkpoint."""
    with Checkpoints(workdir, keep_last=1, keep_every=0) as checkpoints:
        checkpoints.save(1, {"params": {"a": jnp.zeros(1)}, "ema": averages}, tiny.config(), {})


def networks(**trees):
    """Networks with these parameters at their start."""
    return {name: Network(lambda key, tree=tree: tree, None) for name, tree in trees.items()}


def begin(donor, trained):
    return initial_parameters(tiny.config(init_from=str(donor)), trained, SEED, NOWHERE)


class TestAdditions:
    """What the donor does not have starts at zero, and is named."""

    def test_of_layers(self, tmp_path):
        save(tmp_path, network={"conv": {"kernel": jnp.full(3, 2.0)}})
        wanted = {"conv": {"kernel": jnp.ones(3)}, "label": {"embedding": jnp.ones((4, 2))}}
        params, origin = begin(tmp_path, networks(network=wanted))
        found = params["network"]
        np.testing.assert_array_equal(found["conv"]["kernel"], 2)
        np.testing.assert_array_equal(found["label"]["embedding"], np.zeros((4, 2)))
        assert origin == f"parameters of {tmp_path}, step 1; new, at zero: label/embedding"

    def test_of_networks_are_drawn(self, tmp_path):
        """A critic beside it; the network that is served takes the only one there is."""
        save(tmp_path, teacher={"w": jnp.full(3, 2.0)})
        trained = networks(network={"w": jnp.ones(3)}, critic={"w": jnp.ones(3)})
        params, origin = begin(tmp_path, trained)
        np.testing.assert_array_equal(params["network"]["w"], 2)
        np.testing.assert_array_equal(params["critic"]["w"], 1)
        assert origin == f"parameters of {tmp_path}, step 1; drawn: critic"

    def test_networks_of_one_name_are_taken(self, tmp_path):
        save(tmp_path, network={"w": jnp.full(3, 2.0)}, critic={"w": jnp.full(3, 3.0)})
        trained = networks(network={"w": jnp.ones(3)}, critic={"w": jnp.ones(3)})
        params, _ = begin(tmp_path, trained)
        assert [float(params[name]["w"][0]) for name in ("network", "critic")] == [2, 3]

    @pytest.mark.parametrize(
        ("donor", "told"),
        [
            ({"network": {"w": np.ones(4, "f")}}, r"does not fit: w is \(4,\), needed is \(3,\)"),
            ({"network": {"w": np.ones(3, "f"), "v": np.ones(1, "f")}}, "v is .*needed is absent"),
            ({"a": {"w": np.ones(3, "f")}, "b": {"w": np.ones(3, "f")}}, "has a, b; needed are ne"),
        ],
    )
    def test_anything_else_is_refused(self, tmp_path, donor, told):
        save(tmp_path, **donor)
        with pytest.raises(UserError, match=f"^config.init_from={tmp_path}.*{told}"):
            begin(tmp_path, networks(network={"w": jnp.ones(3)}))
