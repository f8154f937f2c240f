"""Checkpoints: what comes back, what damage and full disks do, and what is never lost."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from jax_ddpm.errors import UserError
from jax_ddpm.runs import checkpoint
from jax_ddpm.runs.checkpoint import Checkpoints
from jax_ddpm.runs.manifest import Damaged, verify
from jax_ddpm.training.layout import spread
from jax_ddpm.training.state import TrainState, from_items, init_state, to_items

TREES = ("params", "ema", "opt_state", "extra")
ITEMS = (*TREES, "progress", "config")
PROGRESS = {
    "unlogged": {"loss": [0.1 + 0.2, 1 / 3], "rare": [5e-324, -1.7976931348623157e308]},
    "position": 2**53 + 1,
}


def random_bits(tree, seed):
    """Any bits at all, also those of NaNs, infinities and subnormals."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            np.frombuffer(rng.bytes(leaf.nbytes), leaf.dtype).reshape(leaf.shape)
        ),
        tree,
    )


@pytest.fixture(scope="module")
def make_state(make_setting, mesh_of):
    """``make_state(step, num_devices)``: of a few parameters, with random bits in every leaf.

    The optimiser's state holds NamedTuples in tuples, some of them empty, and so does ``extra``.
    """

    def make(step=0, num_devices=1, time_sampler="loss_second_moment", **fields) -> TrainState:
        setting = make_setting(loss__time_sampler=time_sampler, **fields)
        params = {"network": setting.model.network.init(jax.random.key(0))}
        state = init_state(setting.recipe, params)
        state = random_bits(state, step)._replace(step=jnp.array(step, jnp.int32))
        return spread(state, mesh_of(num_devices))

    return make


@pytest.fixture(scope="module")
def small():
    """``small(step)``: a state that is quick to save."""
    return lambda step: TrainState(jnp.array(step), {"w": jnp.full(3, step)}, {}, (), ())


@pytest.fixture(scope="module")
def config(make_setting):
    return make_setting().config


@pytest.fixture(scope="module")
def saved(make_state, config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved")
    with Checkpoints(workdir, keep_last=2, keep_every=0) as checkpoints:
        for step in (1, 2):
            save(checkpoints, make_state(step), config, PROGRESS)
    return workdir


@pytest.fixture
def run(saved, tmp_path):
    """A run with the checkpoints 1 and 2, to be damaged."""
    return shutil.copytree(saved, tmp_path / "run")


def save(checkpoints, state, config, progress):
    checkpoints.save(int(state.step), to_items(state), config, progress)


def restored_by(checkpoints, state):
    step, items, progress = checkpoints.restore(to_items(state))
    return from_items(step, items, state), progress


def restore(workdir, state):
    with Checkpoints(workdir, keep_last=2, keep_every=0) as checkpoints:
        return restored_by(checkpoints, state)


def assert_same_bits(actual, expected):
    """The same structure, types of containers and of arrays, and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, leaf), wanted in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype), path
        assert np.asarray(leaf).tobytes() == np.asarray(wanted).tobytes(), path


def contents(folder):
    """All that lies in a folder: the bytes of files, None for folders."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip_a_bit(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)


@contextlib.contextmanager
def one_line(match, error=UserError):
    with pytest.raises(error, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)


class TestRoundTrip:
    @pytest.mark.parametrize("time_sampler", ["loss_second_moment", "uniform"])
    def test_what_is_saved_comes_back_bit_by_bit(self, make_state, config, tmp_path, time_sampler):
        """Uniform times leave ``extra`` empty."""
        state = make_state(123_456, time_sampler=time_sampler)
        assert bool(jax.tree.leaves(state.extra)) == (time_sampler == "loss_second_moment")
        with Checkpoints(tmp_path, keep_last=1, keep_every=0) as checkpoints:
            save(checkpoints, state, config, PROGRESS)
            assert checkpoints.last == 123_456
        with Checkpoints(tmp_path, keep_last=1, keep_every=0) as checkpoints:
            assert checkpoints.last is None
            restored, progress = restored_by(checkpoints, make_state(7, time_sampler=time_sampler))
            assert checkpoints.last == 123_456
        assert_same_bits(restored, state)
        assert progress == PROGRESS
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(restored))

    @pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1)])
    def test_the_number_of_devices_may_change(self, make_state, config, tmp_path, before, after):
        with Checkpoints(tmp_path, keep_last=1, keep_every=0) as checkpoints:
            save(checkpoints, make_state(5, before), config, PROGRESS)
        template = make_state(0, after)
        restored, _ = restore(tmp_path, template)
        assert_same_bits(restored, make_state(5))
        for leaf, wanted in zip(*map(jax.tree.leaves, (restored, template)), strict=True):
            assert leaf.sharding == wanted.sharding
            assert len({shard.data.tobytes() for shard in map(np.asarray, shards(leaf))}) == 1
            assert len(shards(leaf)) == after

    def test_a_run_without_checkpoints_starts_with_what_it_has(self, make_state, tmp_path):
        items = to_items(make_state())
        with Checkpoints(tmp_path / "new", keep_last=2, keep_every=0) as checkpoints:
            assert checkpoints.restore(items) == (0, items, {})
            assert checkpoints.last is None
        assert checkpoint.steps(tmp_path / "new") == []
        assert checkpoint.newest(tmp_path / "new") is None

    def test_relative_paths(self, small, config, tmp_path, monkeypatch):
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path)
        run = tmp_path.relative_to(tmp_path) / "runs" / "x"
        with Checkpoints(run, keep_last=1, keep_every=0) as checkpoints:
            monkeypatch.chdir(tmp_path / "elsewhere")
            save(checkpoints, small(3), config, {})
            monkeypatch.chdir(tmp_path)
        assert checkpoint.newest(run) == 3
        np.testing.assert_array_equal(checkpoint.restore_item(run, 3, "params")["w"], 3)
        assert checkpoint.newest(tmp_path / "runs" / "x") == 3

    @pytest.mark.parametrize("num_devices", [1, 4])
    def test_steps_taken_while_it_is_written_do_not_reach_it(
        self, mesh_of, config, tmp_path, num_devices
    ):
        """The step donates the arrays that are being saved."""
        whole = NamedSharding(mesh_of(num_devices), PartitionSpec())
        count = 1_000_000
        state = TrainState(
            jnp.array(1, jnp.int32), {"w": jnp.arange(count, dtype=jnp.float32)}, {}, (), ()
        )
        state = spread(state, mesh_of(num_devices))
        step = jax.jit(
            lambda state: jax.tree.map(lambda x: -x - 1, state),
            out_shardings=whole,
            donate_argnums=0,
        )
        with Checkpoints(tmp_path, keep_last=1, keep_every=0) as checkpoints:
            save(checkpoints, state, config, {})
            for _ in range(3):
                state = step(state)
            jax.block_until_ready(state)
        found = checkpoint.restore_item(tmp_path, 1, "params")["w"]
        np.testing.assert_array_equal(found, np.arange(count, dtype="f"))


def shards(leaf):
    return [shard.data for shard in leaf.addressable_shards]


def test_keeps_the_last_ones_and_some_for_good(small, config, tmp_path):
    """It does so across runs, and never keeps fewer while the next one is being written."""

    def session(steps, keep_last, keep_every):
        written = checkpoint.steps(tmp_path)
        with Checkpoints(tmp_path, keep_last, keep_every) as checkpoints:
            for step in steps:
                save(checkpoints, small(step), config, {})
                assert set(written[-keep_last:]) <= set(checkpoint.steps(tmp_path))
                written.append(step)
        kept = checkpoint.steps(tmp_path)
        names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
        assert names == {str(step) for step in kept}, "nothing else stays behind"
        for step in kept:
            verify(tmp_path / "checkpoints" / str(step))
        return kept

    assert session([2, 3, 4, 5], keep_last=2, keep_every=4) == [4, 5]
    assert session([6, 10], keep_last=2, keep_every=4) == [4, 6, 10]
    assert session([11], keep_last=3, keep_every=4) == [4, 6, 10, 11]
    assert session([12], keep_last=1, keep_every=0) == [12]


class TestManifest:
    def test_holds_the_sha256_of_every_file_of_every_item(self, saved):
        folder = saved / "checkpoints" / "2"
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest == {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for item in ITEMS
            for path in files_of(folder / item)
        }
        assert {path.name for path in folder.iterdir() if path.is_dir()} == set(ITEMS)

    @pytest.mark.parametrize("item", ITEMS)
    def test_one_flipped_bit_in_any_file_is_noticed(self, run, item):
        folder, rng = run / "checkpoints" / "2", np.random.default_rng(0)
        verify(run / "checkpoints" / "2")
        for path in files_of(folder / item):
            whole = path.read_bytes()
            flip_a_bit(path, rng)
            name = path.relative_to(folder).as_posix()
            for items in (None, [item], ITEMS):
                with one_line(f"^{name} has changed", Damaged):
                    verify(run / "checkpoints" / "2", items)
            verify(run / "checkpoints" / "2", set(ITEMS) - {item})
            path.write_bytes(whole)
        verify(run / "checkpoints" / "2")

    def test_the_config_is_kept_with_the_state(self, saved, config):
        stored = json.loads((saved / "checkpoints" / "2" / "config" / "metadata").read_text())
        assert stored == json.loads(config.to_json())


def flipped(path):
    flip_a_bit(path, np.random.default_rng(1))


def truncated(path):
    path.write_bytes(path.read_bytes()[:-2])


def missing(path):
    path.unlink()


def unreadable(path):
    """Like a file on a failing disk: there, but reading it is an error."""
    path.unlink()
    path.mkdir()


def garbled(data):
    def garble(path):
        path.write_bytes(data)

    return garble


class TestDamage:
    def damage(self, run, step, how, name="params/_METADATA"):
        how(run / "checkpoints" / str(step) / name)

    @pytest.mark.parametrize(
        ("how", "name"),
        [
            (flipped, "ema/_METADATA"),
            (truncated, "opt_state/_sharding"),
            (missing, "extra/manifest.ocdbt"),
            (unreadable, "progress/metadata"),
            (missing, "manifest.json"),
            (truncated, "manifest.json"),
            (unreadable, "manifest.json"),
            *((garbled(data), "manifest.json") for data in (b"", b"\xff{", b"[]", b"null", b"{}")),
        ],
    )
    def test_the_checkpoint_before_is_used_and_the_damaged_one_set_aside(
        self, run, make_state, how, name
    ):
        self.damage(run, 2, how, name)
        before = contents(run / "checkpoints" / "2")
        with pytest.warns(UserWarning, match=f"^checkpoint 2 is damaged: {name}") as warned:
            restored, progress = restore(run, make_state())
        assert len(warned) == 1
        assert "\n" not in str(warned[0].message)
        assert_same_bits(restored, make_state(1))
        assert progress == PROGRESS
        assert checkpoint.steps(run) == [1]
        assert contents(run / "damaged" / "2") == before

    def test_a_file_that_the_disk_cannot_read_counts_as_damaged(self, run, monkeypatch):
        digest = hashlib.file_digest

        def failing_disk(file, name):
            if "/2/" in file.name:
                raise OSError(errno.EIO, "Input/output error", file.name)
            return digest(file, name)

        monkeypatch.setattr(checkpoint.hashlib, "file_digest", failing_disk)
        with pytest.warns(UserWarning, match=r"^checkpoint 2 is damaged: .*"):
            assert checkpoint.newest(run) == 1

    def test_nothing_is_deleted_where_all_are_damaged(self, run, make_state):
        for step in (1, 2):
            self.damage(run, step, flipped)
        before = contents(run)
        with (
            pytest.warns(UserWarning, match=r"^checkpoint [12] is damaged: params/") as warned,
            one_line(f"{run}.*every checkpoint is damaged"),
        ):
            restore(run, make_state())
        assert len(warned) == 2
        assert contents(run) == before

    def test_saving_goes_on_from_the_one_before(self, run, make_state, config):
        """It also writes over the step of the damaged one."""
        self.damage(run, 2, missing)
        with Checkpoints(run, keep_last=2, keep_every=0) as checkpoints:
            with pytest.warns(UserWarning, match="checkpoint 2 is damaged"):
                state, progress = restored_by(checkpoints, make_state())
            assert checkpoints.last == 1
            save(checkpoints, state._replace(step=state.step + 1), config, progress)
        restored, _ = restore(run, make_state())
        assert_same_bits(restored, state._replace(step=restored.step))
        assert restored.step == 2

    def test_averages_can_be_read_when_all_else_is_lost(self, run, make_state):
        """Sampling from a run does not need a run that can go on."""
        folder, rng = run / "checkpoints" / "2", np.random.default_rng(0)
        shutil.rmtree(folder / "params")
        (folder / "_CHECKPOINT_METADATA").unlink()
        for path in files_of(folder):
            if path.relative_to(folder).parts[0] not in ("ema", "manifest.json"):
                flip_a_bit(path, rng)
        assert checkpoint.newest(run, ["ema"]) == 2
        stored = checkpoint.restore_item(run, 2, "ema")
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(stored))
        assert_same_bits(stored, make_state(2).ema)

    @pytest.mark.parametrize("how", [flipped, truncated, missing])
    def test_a_damaged_item_is_not_read(self, run, how):
        self.damage(run, 2, how, "ema/manifest.ocdbt")
        with one_line(f"checkpoint 2 in {run}: ema/manifest.ocdbt"):
            checkpoint.restore_item(run, 2, "ema")
        assert set(checkpoint.restore_item(run, 2, "params")) == {"network"}

    @pytest.mark.parametrize(("step", "item"), [(3, "ema"), (2, "no_such_item")])
    def test_what_is_not_there_is_one_line(self, saved, step, item):
        with one_line(f"checkpoint {step} in {saved}"):
            checkpoint.restore_item(saved, step, item)


class TestLeftovers:
    """What a killed process leaves behind."""

    @pytest.fixture
    def killed(self, run):
        """Killed while saving step 7, before the rename, and while deleting step 0."""
        folder = run / "checkpoints"
        shutil.copytree(folder / "2", folder / "7.orbax-checkpoint-tmp")
        shutil.copytree(folder / "1", folder / "0.deleted")
        shutil.rmtree(folder / "0.deleted" / "ema")
        return run

    def test_are_no_checkpoints_and_removed_on_opening(self, killed, make_state):
        assert checkpoint.steps(killed) == [1, 2]
        with pytest.warns(UserWarning, match="^checkpoint 7 was not finished") as warned:
            restored, _ = restore(killed, make_state())
        assert len(warned) == 1
        assert_same_bits(restored, make_state(2))
        assert {path.name for path in (killed / "checkpoints").iterdir()} == {"1", "2"}

    def test_reading_changes_nothing(self, killed):
        """A run may be sampled from while it is training, and saving."""
        truncated(killed / "checkpoints" / "2" / "opt_state" / "_METADATA")
        before = contents(killed)
        with pytest.warns(UserWarning, match="checkpoint 2 is damaged"):
            assert checkpoint.newest(killed) == 1
        assert checkpoint.newest(killed, ["ema"]) == 2
        checkpoint.restore_item(killed, 2, "ema")
        assert contents(killed) == before


class TestFailingSaves:
    FAILED = r"^checkpoint 3 could not be written \(.*\); checkpoint 2 is the last one$"

    @pytest.fixture
    def full(self, monkeypatch):
        """The disk is full when the background save is about to finish."""
        digest = hashlib.file_digest

        def full_disk(file, name):
            if ".orbax-checkpoint-tmp/" in file.name:
                raise OSError(errno.ENOSPC, "No space left on device")
            return digest(file, name)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.hashlib, "file_digest", full_disk)
            yield patch

    def assert_others_are_whole(self, run):
        assert checkpoint.steps(run) == [1, 2]
        for step in (1, 2):
            verify(run / "checkpoints" / str(step))

    def check_again_and_again(self, checkpoints):
        end = time.monotonic() + 30
        while time.monotonic() < end:
            checkpoints.check()
            time.sleep(0.01)

    @pytest.mark.parametrize("surface", ["check", "save", "wait"])
    def test_are_told_by_whatever_comes_next(self, run, full, small, config, surface):
        with Checkpoints(run, keep_last=2, keep_every=0) as checkpoints:
            save(checkpoints, small(3), config, {})
            with one_line(self.FAILED):
                if surface == "check":
                    self.check_again_and_again(checkpoints)
                elif surface == "save":
                    save(checkpoints, small(4), config, {})
                else:
                    checkpoints.wait()
            self.assert_others_are_whole(run)
            checkpoints.check()  # told once

    def test_are_told_at_the_end(self, run, full, small, config):
        with one_line(self.FAILED), Checkpoints(run, keep_last=2, keep_every=0) as checkpoints:
            save(checkpoints, small(3), config, {})
        self.assert_others_are_whole(run)

    def test_do_not_keep_the_next_one_from_succeeding(self, run, full, small, config):
        with Checkpoints(run, keep_last=2, keep_every=0) as checkpoints:
            save(checkpoints, small(3), config, {})
            with one_line(self.FAILED):
                checkpoints.wait()
            full.undo()
            save(checkpoints, small(3), config, {})
            checkpoints.wait()
            verify(run / "checkpoints" / "3")
        assert checkpoint.steps(run) == [2, 3]

    def test_are_cleared_away_by_the_next_run(self, run, full, small, config):
        with (
            pytest.raises(UserError, match="could not be written"),
            Checkpoints(run, keep_last=2, keep_every=0) as checkpoints,
        ):
            save(checkpoints, small(3), config, {})
        with (
            pytest.warns(UserWarning, match="checkpoint 3 was not finished"),
            Checkpoints(run, keep_last=2, keep_every=0),
        ):
            self.assert_others_are_whole(run)
        assert {path.name for path in (run / "checkpoints").iterdir()} == {"1", "2"}

    @pytest.mark.parametrize("size", [0, 50_000])
    def test_files_that_cannot_grow(self, run, config, size):
        """The first small files cannot be written, nor, later in the background, the arrays."""
        rng = np.random.default_rng(0)
        state = TrainState(jnp.array(3), {"w": jnp.asarray(rng.random(100_000))}, {}, (), ())
        with (
            one_line(self.FAILED),
            Checkpoints(run, keep_last=2, keep_every=0) as checkpoints,
            tiny.no_file_grows_past(size),
        ):
            save(checkpoints, state, config, {})
            checkpoints.wait()
        self.assert_others_are_whole(run)

    def test_a_folder_that_cannot_be_written_keeps_no_thread_waiting(
        self, run, small, config, monkeypatch
    ):
        """One that waits would keep the process alive for minutes after its error."""
        make, before = os.mkdir, {*threading.enumerate()}

        def mkdir(path, *args, **kwargs):
            if ".orbax-checkpoint-tmp" in str(path):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            make(path, *args, **kwargs)

        monkeypatch.setattr(os, "mkdir", mkdir)
        with one_line(self.FAILED), Checkpoints(run, keep_last=2, keep_every=0) as checkpoints:
            save(checkpoints, small(3), config, {})
        assert {*threading.enumerate()} == before

    def test_say_no_more_than_their_line(self, tmp_path):
        """A process of its own, as pytest takes the errors of threads for itself."""
        program = f"""
import pathlib, jax, numpy as np, tiny
from jax_ddpm.errors import UserError
from jax_ddpm.runs.checkpoint import Checkpoints
items = {{name: {{str(i): jax.numpy.asarray(np.random.rand(10_000)) for i in range(10)}}
         for name in ("params", "ema", "opt_state")}}
try:
    workdir = pathlib.Path({str(tmp_path)!r})
    with Checkpoints(workdir, 2, 0) as files, tiny.no_file_grows_past(20_000):
        files.save(3, items, tiny.config(), {{}})
        files.wait()
except UserError as error:
    print(error)
"""
        folder = pathlib.Path(__file__).parents[1]
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, timeout=120
        )
        assert done.stdout.startswith("checkpoint 3 could not be written")
        assert done.stderr == ""

    def test_a_checkpoint_is_never_overwritten(self, run, small, config):
        before = contents(run)
        with (
            one_line("^checkpoint 2 could not be written"),
            Checkpoints(run, keep_last=2, keep_every=0) as checkpoints,
        ):
            save(checkpoints, small(2), config, {})
        assert contents(run) == before

    def test_the_first_one(self, tmp_path, full, small, config):
        with (
            one_line(r"^checkpoint 3 could not be written .*; there is none before it$"),
            Checkpoints(tmp_path, keep_last=2, keep_every=0) as checkpoints,
        ):
            save(checkpoints, small(3), config, {})

    def test_do_not_hide_another_error(self, run, full, small, config):
        with pytest.raises(ZeroDivisionError):
            save_and_fail(run, small(3), config)
        self.assert_others_are_whole(run)


def save_and_fail(workdir, state, config):
    with Checkpoints(workdir, keep_last=2, keep_every=0) as checkpoints:
        save(checkpoints, state, config, {})
        raise ZeroDivisionError


def test_an_error_does_not_lose_the_save_under_way(small, config, tmp_path):
    with pytest.raises(ZeroDivisionError):
        save_and_fail(tmp_path, small(3), config)
    verify(tmp_path / "checkpoints" / "3")


class TestOtherStructure:
    """A config that was changed regardless, or code that was."""

    def with_network(self, state, change):
        return state._replace(params={"network": change(dict(state.params["network"]))})

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (lambda p: p | {"label": p["label"][1:]}, r"network/label .*\(4,\), .*\(3,\)"),
            (lambda p: p | {"new": p["gain"]}, r"network/new is absent, needed is \(\)"),
            (
                lambda p: {"gain": p["gain"], "bias": p["bias"]},
                r"network/label is \(4,\), .*absent",
            ),
            (lambda p: p | {"gain": {"inner": p["gain"]}}, r"network/gain/inner is absent"),
        ],
        ids=["shape", "more", "fewer", "deeper"],
    )
    def test_of_the_network_is_named(self, saved, make_state, change, named):
        before = contents(saved)
        with one_line(f"^checkpoint 2 in {saved} .*{named}"):
            restore(saved, self.with_network(make_state(), change))
        assert contents(saved) == before

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (lambda state: state._replace(ema={"slow": state.ema["network"]}), "slow"),
            (lambda state: state._replace(opt_state=state.opt_state * 2), "opt_state"),
            (
                lambda state: state._replace(
                    opt_state=(optax.sgd(0.1, momentum=0.9).init(state.params),)
                ),
                "opt_state",
            ),
            (lambda state: state._replace(extra=({"count": state.step},)), "extra"),
            (
                lambda state: state._replace(
                    extra=(state.extra[0]._replace(counts=state.extra[0].counts[1:]),)
                ),
                "counts",
            ),
        ],
        ids=["averages", "phases", "optimiser", "extra", "shape_of_extra"],
    )
    def test_of_the_rest_is_named(self, saved, make_state, change, named):
        with one_line(f"checkpoint 2 in {saved}.*{named}"):
            restore(saved, change(make_state()))

    def test_memory_that_was_not_kept_is_named(self, make_state, small, config, tmp_path):
        with Checkpoints(tmp_path, keep_last=1, keep_every=0) as checkpoints:
            save(checkpoints, make_state(1, time_sampler="uniform"), config, {})
        with one_line(f"checkpoint 1 in {tmp_path}.*extra"):
            restore(tmp_path, make_state())
