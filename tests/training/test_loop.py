"""The loop around the step, with the network replaced by one of a few parameters."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny

from jax_ddpm import factory
from jax_ddpm.errors import UserError
from jax_ddpm.training import checkpoint
from jax_ddpm.training.loop import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """``run(workdir, …)`` trains on the digits for four steps."""

    def run(workdir, **fields):
        config = tiny.config(
            **{
                "training__log_every": 2,
                "training__heldout_every": 4,
                "training__heldout_examples": 20,
                "training__sample_every": 2,
            }
            | fields
        )
        train(config, workdir)
        return workdir

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "make_network", lambda module, shape: tiny.network(shape[-1]))
        yield run


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    return run(tmp_path_factory.mktemp("finished"))


def log(workdir, *without):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in without} for line in lines]


def test_writes_at_its_intervals_and_at_the_end(finished):
    assert [line["step"] for line in log(finished) if "loss" in line] == [2, 4]
    assert [line["step"] for line in log(finished) if "heldout_loss" in line] == [4]
    pictures = sorted(path.name for path in (finished / "samples").iterdir())
    assert pictures == ["step_0000002.png", "step_0000004.png"]
    assert [*(finished / "tensorboard").iterdir()]
    assert json.loads((finished / "data.json").read_text())["identity"].startswith("sklearn-digits")


def test_refuses_a_workdir_that_holds_a_finished_run(run, finished):
    before = (finished / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=str(finished)) as caught:
        run(finished)
    assert "\n" not in str(caught.value)
    assert (finished / "metrics.jsonl").read_text() == before


def test_starts_an_unfinished_run_over_and_repeats_it_exactly(run, finished, tmp_path):
    workdir = tmp_path / "unfinished"
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "checkpoint")
    run(workdir)
    assert log(workdir, "images_per_second") == log(finished, "images_per_second")
    jax.tree.map(
        np.testing.assert_array_equal, checkpoint.restore(workdir), checkpoint.restore(finished)
    )


def test_average_and_parameters_are_both_kept(finished):
    saved = checkpoint.restore(finished)
    assert saved.keys() == {"params", "ema"}
    assert np.any(saved["params"]["network"]["gain"] != saved["ema"]["network"]["gain"])


def test_stops_at_the_first_step_that_is_not_finite(run, tmp_path):
    """Adam's first update is as large as the learning rate, so the second loss overflows."""
    with pytest.raises(UserError, match=r"^step 1: loss.* not finite") as caught:
        run(tmp_path, training__learning_rate=1e30)
    assert "\n" not in str(caught.value)
    assert not checkpoint.exists(tmp_path)
