import dataclasses

import jax
import numpy as np
import pytest
import tiny

from jax_ddpm.data.source import ArraySource
from jax_ddpm.tasks.diffusion import DiffusionObjective
from jax_ddpm.training.heldout import HeldOut
from jax_ddpm.training.state import init_state

COUNT = 10
SEED = jax.random.key(1)


@pytest.fixture(scope="module")
def source():
    data = tiny.batch(tiny.spec(), COUNT)
    return ArraySource({"train": data, "heldout": data}, num_levels=17, identity="tiny")


@dataclasses.dataclass(frozen=True, eq=False)
class LabelAsLoss(DiffusionObjective):
    """A loss that is known."""

    def __call__(self, params, extra, batch, keys, step):
        return batch["label"].astype("float32"), {}, extra


def with_labels_as_loss(recipe, kind=LabelAsLoss):
    (phase,) = recipe.phases
    return recipe._replace(phases=(phase._replace(objective=kind(**vars(phase.objective))),))


def state_of(recipe):
    params = {name: each.init(jax.random.key(0)) for name, each in recipe.networks.items()}
    return init_state(recipe, params)


@pytest.mark.parametrize("max_examples", [COUNT, 7, 100])
@pytest.mark.parametrize(("batch_size", "num_devices"), [(1, 1), (3, 1), (64, 1), (4, 4)])
def test_every_example_counts_once(
    make_setting, mesh_of, source, batch_size, num_devices, max_examples
):
    """Powers of two as losses: their sum tells which were counted, and how often."""
    powers = source.batch("heldout", np.arange(COUNT)) | {"label": 2 ** np.arange(COUNT)}
    with pytest.warns(UserWarning, match="cannot learn them"):  # most of the numbers between
        powers = ArraySource({"train": powers, "heldout": powers}, num_levels=17, identity="powers")
    recipe = with_labels_as_loss(make_setting().recipe)
    heldout = HeldOut(recipe, powers, SEED, mesh_of(num_devices), batch_size, max_examples)
    count = min(COUNT, max_examples)
    total = round(heldout(state_of(recipe))["heldout_loss"] * count)
    assert total.bit_count() == count
    if count < COUNT:
        assert total != 2**count - 1, "not the first ones: files are often sorted by class"


@pytest.fixture
def measure(make_setting, mesh_of, source):
    def measure(batch_size=16, num_devices=1, max_examples=COUNT, calls=1, **fields):
        setting, mesh = make_setting(**fields), mesh_of(num_devices)
        heldout = HeldOut(setting.recipe, source, SEED, mesh, batch_size, max_examples)
        return [heldout(state_of(setting.recipe)) for _ in range(calls)]

    return measure


def test_value_depends_on_parameters_alone(measure):
    """The call, the batch size, devices and the randomness of training do not matter."""
    first, second = measure(calls=2)
    assert first == second
    assert first.keys() == {"heldout_loss"} | {f"heldout_loss_quarter{i}" for i in (1, 2, 3, 4)}
    (split,) = measure(batch_size=4, num_devices=4, data__flip=False, training__label_drop=0.9)
    np.testing.assert_allclose([*split.values()], [*first.values()], rtol=1e-5)


@pytest.mark.parametrize("few", [{"max_examples": 2}, {"process__num_timesteps": 2}], ids=str)
def test_a_quarter_without_examples_is_left_out(measure, few):
    (values,) = measure(**few)
    assert np.all(np.isfinite([*values.values()]))
    assert 1 < len(values) < 5


class TestPoll:
    @pytest.fixture
    def heldout(self, make_setting, mesh_of, source):
        """Ten examples in four batches; ``traced`` says whether one was ever evaluated."""

        class Traced(LabelAsLoss):
            def __call__(self, *args):
                traced.append(True)
                return super().__call__(*args)

        traced = []
        recipe = with_labels_as_loss(make_setting().recipe, Traced)
        held = HeldOut(recipe, source, SEED, mesh_of(1), batch_size=3, max_examples=COUNT)
        state = state_of(recipe)
        return lambda *poll: held(state, *poll), traced

    def test_is_asked_before_each_batch(self, heldout):
        polls = []
        measured, traced = heldout
        values = measured(lambda: polls.append(list(traced)))
        assert len(polls) == 4
        assert polls[0] == []
        assert values == measured()

    @pytest.mark.parametrize("batch", [1, 4])
    def test_what_it_raises_passes_through(self, heldout, batch):
        class Asked(Exception):
            pass

        def poll():
            polls.append(None)
            if len(polls) == batch:
                raise Asked

        polls = []
        measured, traced = heldout
        with pytest.raises(Asked):
            measured(poll)
        assert len(polls) == batch
        assert bool(traced) == (batch > 1)
