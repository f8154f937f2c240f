"""Runs that are killed again and again end exactly as if nothing had happened."""

import json
import os
import pathlib
import random
import resource
import shutil
import signal
import time

import jax
import numpy as np
import pytest
import tiny
from command import ROOT, Run

from jax_ddpm import factory
from jax_ddpm.runs import checkpoint
from jax_ddpm.runs.manifest import verify
from jax_ddpm.runtime.stopping import EXIT_CODE

pytestmark = pytest.mark.slow

FLAGS = [
    f"--config={ROOT / 'configs' / 'digits_conditional.py'}",
    "--config.process.num_timesteps=4",
    "--config.loss.time_sampler=loss_second_moment",
    "--config.training.num_steps=40",
    "--config.training.batch_size=8",
    "--config.training.log_every=7",
    "--config.training.heldout_every=9",
    "--config.training.heldout_examples=20",
    "--config.training.sample_every=10",
    "--config.training.checkpoint_every=3",
    "--config.sampling.num_samples=10",
    "--config.sampling.batch_size=10",
]


def replace_network():
    """Puts a network of a few parameters in place in the child, which compiles fast."""
    factory.make_network = lambda module, x, *_: tiny.network(x.shape[-1], module.num_classes)


def train(folder, *flags, workdir):
    return Run(folder, *FLAGS, f"--workdir={workdir}", *flags, prepare=replace_network)


def log(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) | {"images_per_second": None} for line in lines]


def assert_same_run(one: pathlib.Path, other: pathlib.Path):
    """The last checkpoint, the log and the pictures, bit by bit."""
    assert log(one) == log(other)
    assert checkpoint.steps(one)[-1] == checkpoint.steps(other)[-1]
    last = checkpoint.steps(one)[-1]
    for item in ("params", "ema", "opt_state", "extra"):
        trees = [checkpoint.restore_item(workdir, last, item) for workdir in (one, other)]
        jax.tree.map(np.testing.assert_array_equal, *trees)
    pictures = [
        {path.name: path.read_bytes() for path in (workdir / "samples").iterdir()}
        for workdir in (one, other)
    ]
    assert pictures[0] == pictures[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    result = train(workdir.parent / "output", workdir=workdir).result()
    assert result.returncode == 0, result.stderr
    return workdir


def test_killed_again_and_again(undisturbed, tmp_path):
    """SIGKILL, SIGTERM or SIGINT comes at any moment: also before the first step, while evaluating,
    while saving, and while stopping."""
    workdir, rng, seen = tmp_path / "run", random.Random(0), []
    for attempt in range(100):
        kind = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        run = train(tmp_path / f"output{attempt}", workdir=workdir)
        run.wait_for("compiling")
        # From one to the next it gets a little further, fast machine or slow.
        time.sleep(rng.uniform(0, 0.05 * (attempt + 1) ** 1.25))
        if run.process.is_alive():
            os.kill(run.process.pid, kind)
        result = run.result()
        if result.returncode == 0:
            break
        expected = -signal.SIGKILL if kind == signal.SIGKILL else EXIT_CODE
        assert result.returncode == expected, result.stderr
        seen.append((kind, checkpoint.steps(workdir)))
    assert len(seen) >= 10, "killed often"
    assert len({len(steps) and steps[-1] for _, steps in seen}) >= 4, "stopped at many steps"
    assert_same_run(workdir, undisturbed)


def limit_file_size():
    """Lets no file grow beyond 2000 bytes in the child, as on a disk with little room."""
    replace_network()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


def test_a_full_disk_is_one_line_and_costs_nothing(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    shutil.rmtree(workdir / "checkpoints" / "40")
    flags = [*FLAGS, f"--workdir={workdir}"]
    result = Run(tmp_path / "full", *flags, prepare=limit_file_size).result()
    assert result.returncode == 1
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert "File too large" in line
    assert checkpoint.steps(workdir) == [39]
    verify(workdir / "checkpoints" / "39")
    assert train(tmp_path / "again", workdir=workdir).result().returncode == 0
    assert_same_run(workdir, undisturbed)
