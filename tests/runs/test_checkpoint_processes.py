"""Checkpoints written by some processes and read by others."""

import functools

import jax
import numpy as np
import pytest
from jobs import joined

from jax_ddpm.config import default
from jax_ddpm.runs import checkpoint
from jax_ddpm.runs.checkpoint import Checkpoints
from jax_ddpm.runs.manifest import verify
from jax_ddpm.runtime.devices import fetch, make_mesh
from jax_ddpm.runtime.distributed import from_first, is_first
from jax_ddpm.training.layout import spread
from jax_ddpm.training.state import TrainState, from_items, to_items

PROGRESS = {"unlogged": {"loss": [1.5, 2.0]}, "position": 7}

pytestmark = pytest.mark.slow


def large_state(step, num_devices, fsdp):
    """A state on all devices of all processes; ``fsdp`` of them share the large array."""
    rng = np.random.default_rng(step)
    trees = [{"large": rng.random((64, 64)), "small": rng.random(3)} for _ in range(3)]
    count = np.array(step, np.int32)
    assert jax.device_count() == num_devices
    return spread(TrainState(count, *trees, ()), make_mesh(fsdp))


def save_large(workdir, fsdp):
    if not is_first():
        checkpoint.steps = checkpoint.shutil = None  # what only the first process may use
    with Checkpoints(workdir, keep_last=2, keep_every=0) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, to_items(large_state(step, 4, fsdp)), default(), PROGRESS)


def restore_large(workdir, fsdp):
    with Checkpoints(workdir, keep_last=2, keep_every=0) as checkpoints:
        assert checkpoint.newest(workdir) == 3
        template = large_state(0, 4, fsdp)
        step, items, progress = checkpoints.restore(to_items(template))
    restored = from_items(step, items, template)
    assert progress == PROGRESS
    for leaf, wanted in zip(*map(jax.tree.leaves, (restored, template)), strict=True):
        assert leaf.sharding == wanted.sharding
    expected = fetch(large_state(3, 4, fsdp))
    jax.tree.map(np.testing.assert_array_equal, fetch(restored), expected)
    alone = checkpoint.restore_item(workdir, 3, "params")
    np.testing.assert_array_equal(alone["large"], fetch(restored.params["large"]))


@pytest.mark.parametrize(("writers", "readers"), [(1, 2), (2, 1), (2, 4)])
def test_what_so_many_processes_write_others_read(tmp_path, writers, readers):
    """Four devices in all; the writers' state is split over all, the readers' over pairs."""
    workdir = tmp_path / "run"
    for name, count, work in (
        ("write", writers, functools.partial(save_large, workdir, 4)),
        ("read", readers, functools.partial(restore_large, workdir, 2)),
    ):
        for result in joined(tmp_path / name, count, 4 // count, work).results():
            assert result.returncode == 0, result.stderr
    assert checkpoint.steps(workdir) == [2, 3]
    for step in (2, 3):
        verify(workdir / "checkpoints" / str(step))
        found = (workdir / "checkpoints" / str(step) / "params").glob("ocdbt.process_*")
        assert len([*found]) == writers, "each has written its part"
    assert [path.name for path in (workdir / "checkpoints").iterdir() if "." in path.name] == []


def damage_and_restore(workdir):
    if not is_first():
        checkpoint.verify = checkpoint.shutil = None  # what only the first process may use
    from_first((workdir / "checkpoints" / "3" / "params" / "_METADATA").unlink)
    with Checkpoints(workdir, keep_last=2, keep_every=0) as checkpoints:
        step, _, _ = checkpoints.restore(to_items(large_state(0, 4, 1)))
    assert step == 2


def test_processes_agree_on_what_is_damaged(tmp_path):
    workdir = tmp_path / "run"
    for name, count, work in (
        ("write", 1, functools.partial(save_large, workdir, 1)),
        ("read", 2, functools.partial(damage_and_restore, workdir)),
    ):
        results = joined(tmp_path / name, count, 4 // count, work).results()
        assert [result.returncode for result in results] == [0] * count, results
    damage = "checkpoint 3 is damaged: params/_METADATA is missing"
    told = [result.stderr.count(damage) for result in results]
    assert told == [1, 0]
    assert [path.name for path in (workdir / "damaged").iterdir()] == ["3"]
