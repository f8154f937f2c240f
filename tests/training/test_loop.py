"""The loop around the step, with the network replaced by one of a few parameters."""

import errno
import json
import os
import shutil

import jax
import numpy as np
import pytest
import tiny

from jax_ddpm import factory
from jax_ddpm.data.plan import batch_indices
from jax_ddpm.errors import UserError
from jax_ddpm.generate import Diverged, Generator
from jax_ddpm.runs import checkpoint
from jax_ddpm.runtime.stopping import Stopped
from jax_ddpm.training.loop import train
from jax_ddpm.training.meter import MetricWriter

NUM_STEPS = 6
FIELDS = {
    "model__class_conditional": True,
    "loss__time_sampler": "loss_second_moment",
    "training__num_steps": NUM_STEPS,
    "training__log_every": 4,
    "training__heldout_every": 3,
    "training__heldout_examples": 20,
    "training__sample_every": 2,
    "training__checkpoint_every": 4,
    "sampling__num_samples": 10,
    "sampling__batch_size": 4,
}


@pytest.fixture(scope="module")
def run():
    """``run(workdir, …)`` trains on the digits for a few steps."""

    def run(workdir, poll=lambda: None, accept_changes=False, **fields):
        train(tiny.config(**FIELDS | fields), workdir, poll=poll, accept_changes=accept_changes)
        return workdir

    def make_network(module, x, *_):
        return tiny.network(x.shape[-1], module.num_classes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "make_network", make_network)
        yield run


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    return run(tmp_path_factory.mktemp("finished"))


def log(workdir):
    """All lines, less what depends on the clock."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line | {"images_per_second": None} for line in lines]


def last_state(workdir):
    step = checkpoint.steps(workdir)[-1]
    items = ("params", "ema", "opt_state", "extra")
    return step, {item: checkpoint.restore_item(workdir, step, item) for item in items}


def pictures(workdir):
    return {path.name: path.read_bytes() for path in (workdir / "samples").iterdir()}


def assert_same_run(one, other):
    assert log(one) == log(other)
    assert pictures(one) == pictures(other)
    jax.tree.map(np.testing.assert_array_equal, last_state(one), last_state(other))


class StopAtCall:
    """A poll that asks to stop at its n-th call."""

    def __init__(self, call):
        self.left = call

    def __call__(self):
        self.left -= 1
        if self.left == 0:
            raise Stopped


def test_writes_at_its_intervals_and_at_the_end(finished):
    assert [line["step"] for line in log(finished) if "loss" in line] == [4, 6]
    assert [line["step"] for line in log(finished) if "heldout_loss" in line] == [3, 6]
    assert sorted(pictures(finished)) == [f"step_000000{i}.png" for i in (2, 4, 6)]
    assert checkpoint.steps(finished) == [4, 6]
    assert [*(finished / "tensorboard").iterdir()]
    assert json.loads((finished / "data.json").read_text())["identity"].startswith("sklearn-digits")


def test_average_and_parameters_are_both_kept(finished):
    _, state = last_state(finished)
    gains = [state[item]["network"]["gain"] for item in ("params", "ema")]
    assert np.any(gains[0] != gains[1])


def test_stopped_again_and_again_ends_the_same(run, finished, tmp_path):
    """Stops come after a step, and amid drawing samples and measuring on held-out data."""
    stops = []
    for call in range(1, 20):
        try:
            run(tmp_path, poll=StopAtCall(call))
        except Stopped:
            stops.append(checkpoint.steps(tmp_path)[-1])
        else:
            break
    assert stops == sorted(stops)
    assert len(set(stops)) < len(stops), "some stops came between two steps"
    assert_same_run(tmp_path, finished)


def test_more_steps_later_end_the_same(run, finished, tmp_path):
    """Only the evaluations at the earlier end differ."""
    run(tmp_path, training__num_steps=5)
    run(tmp_path)
    (tmp_path / "samples" / "step_0000005.png").unlink()
    assert_same_run(tmp_path, finished)


def test_batches_may_stream(run, finished, tmp_path):
    """The bits are the same as where the set lies on the devices."""
    run(tmp_path, data__resident_gigabytes=0.0)
    assert_same_run(tmp_path, finished)


@pytest.fixture(scope="module")
def begun(run, tmp_path_factory):
    """A run that was stopped after its first step."""
    workdir = tmp_path_factory.mktemp("begun")
    with pytest.raises(Stopped):
        run(workdir, poll=StopAtCall(1))
    return workdir


@pytest.mark.parametrize(
    "fields",
    [{"parallel": "pmap"}, {"fsdp": 2}, {"training__steps_per_dispatch": 2}],
    ids=["pmap", "fsdp", "dispatch"],
)
def test_goes_on_however_steps_are_compiled(run, begun, finished, tmp_path, fields):
    """It is not part of a run's identity; sums are rounded differently."""
    workdir = tmp_path / "run"
    shutil.copytree(begun, workdir)
    run(workdir, **fields)
    (step, state), (expected_step, expected) = last_state(workdir), last_state(finished)
    assert step == expected_step
    for item in ("params", "ema"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            state[item],
            expected[item],
        )


def test_a_finished_run_is_left_alone(run, finished):
    before = {path: path.stat().st_mtime_ns for path in (finished / "checkpoints").rglob("*")}
    lines = log(finished)
    run(finished)
    assert {p: p.stat().st_mtime_ns for p in (finished / "checkpoints").rglob("*")} == before
    assert log(finished) == lines


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(run, finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "samples" / "step_0000006.png").unlink()
    array = max(
        (workdir / "checkpoints" / "6" / "ema").rglob("d/*"), key=lambda p: p.stat().st_size
    )
    content = bytearray(array.read_bytes())
    content[len(content) // 2] ^= 1
    array.write_bytes(content)
    with pytest.warns(UserWarning, match="checkpoint 6 is damaged: ema/.* has changed"):
        run(workdir)
    assert_same_run(workdir, finished)
    assert (workdir / "damaged" / "6").is_dir()


def test_another_config_is_refused_unless_told(run, finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    changes = {"training__learning_rate": 1e-3, "training__num_steps": 8}
    with pytest.raises(
        UserError, match=r"training.learning_rate 0.0002 → 0.001; .*--accept_changes"
    ):
        run(workdir, **changes)
    assert json.loads((workdir / "config.json").read_text())["training"]["num_steps"] == NUM_STEPS
    with pytest.warns(UserWarning, match=r"training.learning_rate 0.0002 → 0.001"):
        run(workdir, accept_changes=True, **changes)
    assert last_state(workdir)[0] == 8
    assert json.loads((workdir / "config.json").read_text())["training"]["num_steps"] == 8


def test_accepted_changes_that_do_not_fit_leave_the_run_as_it_was(run, finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    with (
        pytest.warns(UserWarning, match="num_timesteps 8 → 9"),
        pytest.raises(UserError, match=r"does not fit: extra/.* is \(8, 10\), needed is \(9, 10\)"),
    ):
        run(workdir, accept_changes=True, process__num_timesteps=9)
    run(workdir)
    assert_same_run(workdir, finished)


@pytest.mark.parametrize("name", ["config.json", "data.json"])
def test_a_run_whose_identity_is_lost_has_it_in_its_checkpoints(run, finished, tmp_path, name):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / name).unlink()
    run(workdir)
    assert (workdir / name).read_text() == (finished / name).read_text()


def test_fewer_steps_than_are_done_are_refused(run, finished):
    with pytest.raises(UserError, match=r"6 steps are done; raise training.num_steps"):
        run(finished, training__num_steps=4)


def test_starts_from_the_averages_of_another_run(run, finished, tmp_path):
    """A learning rate of almost nothing leaves them as they were."""
    donor, workdir = tmp_path / "donor", tmp_path / "run"
    shutil.copytree(finished, donor)
    fields = {"init_from": str(donor), "training__learning_rate": 1e-30}
    with pytest.raises(Stopped):
        run(workdir, poll=StopAtCall(1), **fields)
    shutil.rmtree(donor)  # no longer needed
    run(workdir, **fields)
    (_, state), (_, start) = last_state(workdir), last_state(finished)
    jax.tree.map(np.testing.assert_array_equal, state["params"], start["ema"])


def test_stops_at_the_first_step_that_is_not_finite(run, finished, tmp_path):
    """Adam's first update is as large as the learning rate, so the second loss overflows."""
    with pytest.raises(UserError, match=r"^step 1: loss.* not finite") as caught:
        run(tmp_path, training__learning_rate=1e30, training__checkpoint_every=1)
    assert "\n" not in str(caught.value)
    report = json.loads((tmp_path / "nonfinite_step_1.json").read_text())
    assert str(tmp_path / "nonfinite_step_1.json") in str(caught.value)
    assert report["step"] == 1
    assert "loss" in report["not_finite"]
    assert report["examples"] == batch_indices(0, 1, 8, 1438).tolist()
    assert str(caught.value).endswith(
        "1 led to it and is set aside in damaged/; training starts over"
    )
    assert [path.name for path in (tmp_path / "damaged").iterdir()] == ["1"]
    run(tmp_path)
    assert_same_run(tmp_path, finished)


@pytest.mark.parametrize("stopped", [False, True])
def test_what_it_advises_after_such_a_step_works(run, tmp_path, stopped):
    """The checkpoint right before it is spoilt, even where it is the only one to be kept."""
    keep = {"training__checkpoint_every": 1, "training__keep_last": 1, "accept_changes": True}

    def fails(error, match, poll, rate):
        with pytest.warns(UserWarning, match="learning_rate"), pytest.raises(error, match=match):
            run(tmp_path, poll=poll, training__learning_rate=rate, **keep)

    with pytest.raises(Stopped):
        run(tmp_path, poll=StopAtCall(2), **keep)
    if stopped:
        fails(Stopped, None, StopAtCall(1), 1e30)
    fails(UserError, "on from checkpoint 2 with --accept_changes", StopAtCall(0), 1.1e30)
    assert checkpoint.steps(tmp_path) == [2]
    run(tmp_path, **keep)
    assert checkpoint.steps(tmp_path) == [NUM_STEPS]
    assert all(np.isfinite(line["loss"]) for line in log(tmp_path) if "loss" in line)


def test_a_picture_that_cannot_be_drawn_is_said_and_the_run_goes_on(
    run, finished, tmp_path, monkeypatch, capfd
):
    """Only the last one, of the model that is kept, is a mistake."""
    draw, calls = Generator.__call__, []

    def diverging(*arguments, **named):
        calls.append(arguments)
        if len(calls) in (2, 3):
            raise Diverged("samples of seed 0 are not finite: 4")
        return draw(*arguments, **named)

    monkeypatch.setattr(Generator, "__call__", diverging)
    with pytest.raises(UserError, match="not finite: 4"):
        run(tmp_path)
    assert "no picture of step 4: samples of seed 0 are not finite: 4" in capfd.readouterr().err
    assert sorted(pictures(tmp_path)) == ["step_0000002.png"]
    run(tmp_path)
    without = pictures(finished)
    del without["step_0000004.png"]
    assert pictures(tmp_path) == without
    assert log(tmp_path) == log(finished)


def test_a_full_disk_is_one_line_and_harms_nothing(run, finished, tmp_path, monkeypatch):
    def write(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(MetricWriter, "write", write)
        with pytest.raises(
            UserError, match="No space left on device; the checkpoints in"
        ) as caught:
            run(tmp_path)
    assert "\n" not in str(caught.value)
    run(tmp_path)
    assert_same_run(tmp_path, finished)


def test_stopping_without_saving_is_an_error(run, tmp_path, monkeypatch):
    """The user who asked for it must not believe that the state is safe."""

    def fail(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "sign", fail)
    with pytest.raises(UserError, match=r"checkpoint 1 could not be written .*No space left"):
        run(tmp_path, poll=StopAtCall(1))


def test_dispatches_end_where_something_is_due(run, finished, tmp_path):
    """Pictures every 2 steps, held-out loss every 3, and so on: with 4 steps at a time, 1 by 1."""
    polls = []
    run(tmp_path, poll=lambda: polls.append(0), training__steps_per_dispatch=4)
    assert [line["step"] for line in log(tmp_path)] == [line["step"] for line in log(finished)]
    assert pictures(tmp_path).keys() == pictures(finished).keys()
    run(
        tmp_path / "rare",
        poll=lambda: polls.append(1),
        training__steps_per_dispatch=5,
        **dict.fromkeys(
            ("training__heldout_every", "training__sample_every", "training__checkpoint_every"), 9
        ),
    )
    assert [line["step"] for line in log(tmp_path / "rare") if "loss" in line] == [4, 6]


def test_a_profile_is_written_on_request(finished, tmp_path, monkeypatch):
    """It covers steps whose phases have names; the run stays the same."""
    config = tiny.config(**FIELDS | {"training__num_steps": 10})
    monkeypatch.setattr(
        factory, "make_network", lambda module, x, *_: tiny.network(x.shape[-1], module.num_classes)
    )
    train(config, tmp_path, profile=True)
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    content = trace.read_bytes()
    for phase in (b"feed", b"step", b"metrics"):
        assert phase in content
    assert log(tmp_path)[0] == log(finished)[0]
