"""Commands as jobs of several processes: the same results as by one, and one set of files."""

import functools
import json
import os
import signal

import jax
import numpy as np
import pytest
import tiny
from command import ROOT, Run
from jobs import free_port, tells_of_another, without_gloo
from PIL import Image

from jax_ddpm import factory
from jax_ddpm.models.network import Network
from jax_ddpm.runs import checkpoint
from jax_ddpm.runtime.stopping import EXIT_CODE

pytestmark = pytest.mark.slow

FLAGS = [
    f"--config={ROOT / 'configs' / 'digits_conditional.py'}",
    "--config.process.num_timesteps=4",
    "--config.loss.time_sampler=loss_second_moment",
    "--config.training.num_steps=60",
    "--config.training.batch_size=8",
    "--config.training.log_every=10",
    "--config.training.heldout_every=30",
    "--config.training.heldout_examples=20",
    "--config.training.sample_every=60",
    "--config.training.checkpoint_every=7",
    "--config.sampling.num_samples=10",
    "--config.sampling.batch_size=8",
]


ITEMS = ("params", "ema", "opt_state", "extra")


def network(out_channels, num_classes):
    """A network of a few parameters and one matrix, large enough to be split over devices."""
    few = tiny.network(out_channels, num_classes)

    def init(key):
        return {"few": few.init(key), "matrix": 0.1 * jax.random.normal(key, (64, 64))}

    def apply(params, x, *others, **named):
        mixed = (x.reshape(len(x), 64) @ params["matrix"]).reshape(x.shape)
        return few.apply(params["few"], x + mixed, *others, **named)

    return Network(init, apply)


def prepare(devices):
    """Sets up a network that compiles fast, and devices, in the child."""
    factory.make_network = lambda module, x, *_: network(x.shape[-1], module.num_classes)
    jax.config.update("jax_num_cpu_devices", devices)


def start(folder, count, devices, *flags, last=()):
    """A command in ``count`` processes with so many devices each; ``last`` are the last one's."""
    address = ["--distributed=manual", f"--coordinator=localhost:{free_port()}"]
    return [
        Run(
            folder / str(index),
            *flags,
            *([*address, f"--num_processes={count}", f"--process_id={index}"] * (count > 1)),
            *(last if index == count - 1 else ()),
            prepare=functools.partial(prepare, devices),
        )
        for index in range(count)
    ]


def results(runs):
    return [run.result(600)._replace(stdout=without_gloo(run.result().stdout)) for run in runs]


def succeeds(folder, count, devices, *flags):
    """The output of the first process; the others must not say anything."""
    first, *others = results(start(folder, count, devices, *flags))
    assert first.returncode == 0, first.stderr
    for other in others:
        assert other == (0, "", "")
    return first.stdout


def train(workdir, count, devices, *flags, last=()):
    folder = workdir.parent / f"{workdir.name}_output_{count}"
    return start(folder, count, devices, *FLAGS, f"--workdir={workdir}", *flags, last=last)


def log(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) | {"images_per_second": 0} for line in lines]


def state(workdir, step):
    return {name: checkpoint.restore_item(workdir, step, name) for name in ITEMS}


def picture(workdir):
    with Image.open(workdir / "samples" / "step_0000060.png") as image:
        return np.asarray(image).astype(int)


def assert_same_run(one, other, exactly):
    """The log, the last state and the picture: bit by bit, or up to the order of sums."""
    error = 0 if exactly else 1e-4
    for line, expected in zip(log(one), log(other), strict=True):
        assert line == pytest.approx(expected, rel=error, abs=error)
    assert checkpoint.steps(one)[-1] == checkpoint.steps(other)[-1] == 60
    states = (state(workdir, 60) for workdir in (one, other))
    jax.tree.map(
        lambda *leaves: np.testing.assert_allclose(*leaves, rtol=error, atol=error), *states
    )
    assert abs(picture(one) - picture(other)).max() <= (0 if exactly else 1)


@pytest.fixture(scope="module")
def by_one(tmp_path_factory):
    """A run in one process with four devices."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    (result,) = results(train(workdir, 1, 4))
    assert result.returncode == 0, result.stderr
    return workdir


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """The same in two processes, with the state split over their devices."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    first, second = results(train(workdir, 2, 2, "--config.fsdp=4"))
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"{workdir}/samples/step_0000060.png\n"
    assert first.stderr.startswith("2 processes on 1 host, each with 2 of 4 × cpu\n")
    assert second == (0, "", ""), "only the first one tells what all do"
    return workdir


def test_two_processes_do_what_one_does(by_one, by_two):
    assert_same_run(by_two, by_one, exactly=False)
    names = [{path.name for path in workdir.iterdir()} for workdir in (by_one, by_two)]
    assert names[0] == names[1]
    params = by_two / "checkpoints" / "60" / "params"
    assert {path.name for path in params.glob("ocdbt.process_*")} == {
        "ocdbt.process_0",
        "ocdbt.process_1",
    }, "each has written its part"


@pytest.mark.parametrize("victim", [0, 1])
def test_one_is_killed_and_the_job_goes_on_exactly(by_two, tmp_path, victim):
    workdir = tmp_path / "run"
    runs = train(workdir, 2, 2, "--config.fsdp=4")
    runs[0].wait_for("step 20/60", seconds=600)
    os.kill(runs[victim].process.pid, signal.SIGKILL)
    killed, other = (results(runs)[index] for index in (victim, 1 - victim))
    assert killed.returncode == -signal.SIGKILL
    assert tells_of_another(other), other
    assert checkpoint.steps(workdir)[-1] < 60
    for result in results(train(workdir, 2, 2, "--config.fsdp=4")):
        assert result.returncode == 0, result.stderr
    assert_same_run(workdir, by_two, exactly=True)


def test_one_is_asked_to_stop_and_another_number_of_processes_goes_on(by_one, tmp_path):
    workdir = tmp_path / "run"
    runs = train(workdir, 4, 1, "--config.fsdp=2")
    runs[0].wait_for("step 20/60", seconds=600)
    os.kill(runs[3].process.pid, signal.SIGTERM)
    stopped = results(runs)
    assert [result.returncode for result in stopped] == [EXIT_CODE] * 4, stopped
    assert stopped[0].stderr.endswith("stopped by SIGTERM; the same command goes on from here\n")
    done = checkpoint.steps(workdir)[-1]
    assert 20 <= done < 60
    assert done % 7, "saved when it stopped"
    (result,) = results(train(workdir, 1, 4))
    assert f"going on after step {done}" in result.stderr
    assert_same_run(workdir, by_one, exactly=False)


def test_samples_and_measurements_are_those_of_one_process(by_one, tmp_path):
    """Their number is not a multiple of the devices."""
    run = f"--workdir={by_one}"
    samples, measures = [], []
    for count, devices in ((1, 4), (2, 2)):
        folder = tmp_path / str(count)
        out = folder / "samples.npz"
        sampling = ["--num_samples=11", "--sample_batch=8", f"--out={out}"]
        assert succeeds(folder / "1", count, devices, "--mode=sample", run, *sampling) == f"{out}\n"
        with np.load(out) as stored:
            samples.append(stored["images"].astype(int))
        out = folder / "measured.json"
        of = ["--metrics=bpd", "--num_examples=13", f"--cache={folder / 'cache'}", f"--out={out}"]
        succeeds(folder / "2", count, devices, "--mode=eval", run, *of)
        measures.append(json.loads(out.read_text())["measured"]["bpd"])
    assert samples[1].shape == (11, 8, 8, 1)
    assert abs(samples[0] - samples[1]).max() <= 1
    assert measures[0]["protocol"] == measures[1]["protocol"]
    assert measures[1]["result"]["value"] == pytest.approx(measures[0]["result"]["value"], rel=1e-5)


@pytest.mark.parametrize(
    ("last", "told"),
    [
        ("--config.seed=1", "process 1 has --config.seed 1, but process 0 0"),
        ("--mode=check", "process 1 has --mode 'check', but process 0 'train'"),
        ("--workdir=runs", f"process 1 has --workdir '{ROOT / 'runs'}', but process 0 '"),
    ],
)
def test_processes_that_disagree_train_nothing(tmp_path, last, told):
    workdir = tmp_path / "run"
    for result in results(train(workdir, 2, 1, last=[last])):
        assert result.returncode == 1
        assert result.stderr.splitlines()[-1].startswith(f"error: {told}")
    assert not workdir.exists()


def test_a_check_is_said_once(tmp_path):
    text = succeeds(tmp_path / "out", 2, 2, "--mode=check", *FLAGS, f"--workdir={tmp_path / 'run'}")
    assert "devices       4 × cpu\n" in text
    assert text.endswith("ready to train\n")
    assert [*(tmp_path / "run").iterdir()] == []
