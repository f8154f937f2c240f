"""Everything that would stop a run is found before it is submitted."""

import contextlib
import io
import pathlib
import shutil
from types import SimpleNamespace
from typing import NamedTuple

import jax
import pytest
import tiny

from jax_ddpm import factory
from jax_ddpm.errors import UserError
from jax_ddpm.runs.identity import save_identity
from jax_ddpm.runtime.devices import make_mesh
from jax_ddpm.runtime.stopping import Stopped
from jax_ddpm.training import compiled_step, preflight
from jax_ddpm.training.preflight import Preflight
from jax_ddpm.training.state import to_items

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

CHECKS = ("devices", "settings", "write access", "data", "parameters", "checkpoints", "train step")

# The tiny network on the digits: a gain, a bias, ten classes and the null label.
PARAMETERS = 1 + 1 + 11
# The parameters, their averages, Adam's two moments; the steps of the run and of Adam.
STATE_BYTES = 4 * (4 * PARAMETERS + 2)
IMAGE_BYTES = 8 * 8


@pytest.fixture(scope="module", autouse=True)
def tiny_network():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            factory,
            "make_network",
            lambda module, x, *_: tiny.network(x.shape[-1], module.num_classes),
        )
        yield


@pytest.fixture
def uncompiled(monkeypatch):
    """No train step is compiled, which takes seconds; it is said to take ten bytes of each kind."""
    sizes = ("argument", "temp", "output", "alias")
    memory = SimpleNamespace(**{f"{name}_size_in_bytes": 10 for name in sizes})
    compiled = SimpleNamespace(memory_analysis=lambda: memory)
    program = SimpleNamespace(lower=lambda *_: SimpleNamespace(compile=lambda: compiled))
    monkeypatch.setattr(preflight, "compile_step", lambda *_: program)


def config(**fields):
    return tiny.config(model__class_conditional=True, **fields)


class Outcome(NamedTuple):
    preflight: Preflight
    rows: dict[str, str]
    error: Exception | None


def outcome(config, workdir, *poll) -> Outcome:
    """The text of each row, and the error that ended the checks."""
    check, error = Preflight(config, workdir), None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            check.run(*poll)
        except Exception as caught:
            error = caught
    lines = printed.getvalue().splitlines()
    return Outcome(check, {line[:14].strip(): line[14:] for line in lines}, error)


def passes(config, workdir):
    """The rows of checks that all pass."""
    _, rows, error = outcome(config, workdir)
    assert error is None
    assert tuple(rows) == CHECKS
    assert "FAILED" not in rows.values()
    return rows


def fails(name, config, workdir):
    """The line that says why a check fails, having come as far as that."""
    _, rows, error = outcome(config, workdir)
    assert isinstance(error, UserError), error
    assert "\n" not in str(error)
    assert tuple(rows) == CHECKS[: 1 + CHECKS.index(name)]
    assert [check for check in rows if rows[check] == "FAILED"] == [name]
    return str(error)


def everything(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else None
        for path in folder.rglob("*")
    }


class TestGoodConfig:
    @pytest.fixture(scope="class")
    @staticmethod
    def taken():
        """The steps that were not only traced but taken."""
        taken, step = [], compiled_step.train_step

        def telling(recipe, state, *arguments, **options):
            jax.debug.callback(taken.append, state.step)
            return step(recipe, state, *arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled_step, "train_step", telling)
            yield taken

    @pytest.fixture(scope="class")
    @staticmethod
    def workdir(tmp_path_factory):
        return tmp_path_factory.mktemp("preflight") / "new" / "run"

    @pytest.fixture(scope="class")
    @staticmethod
    def good(workdir, taken):
        return outcome(config(), workdir)

    def test_has_a_row_for_each_check(self, good):
        assert good.error is None
        assert tuple(good.rows) == CHECKS
        assert good.rows["devices"].startswith("4 × ")
        assert good.rows["settings"] == "4 steps of 8 images"
        assert "sklearn-digits" in good.rows["data"]
        assert "1,438 train + 359 heldout, 8×8×1, 10 classes" in good.rows["data"]
        assert "goes on" not in good.rows["checkpoints"]

    def test_leaves_an_empty_workdir(self, good, workdir):
        assert [*workdir.parent.iterdir()] == [workdir]
        assert everything(workdir) == {}

    def test_counts_the_parameters_and_the_state(self, good):
        found = good.rows["parameters"]
        assert found == f"{PARAMETERS}; with averages and optimiser {STATE_BYTES} bytes"

    def test_takes_no_step(self, good, taken):
        jax.effects_barrier()
        assert not taken
        check = good.preflight
        assert check.state.step == 0
        step = compiled_step.compile_step(
            check.recipe, check.state, check.mesh, data=check.resident
        )
        jax.block_until_ready(step(check.state, check.batches, jax.random.key(check.config.seed)))
        jax.effects_barrier()
        assert taken, "a step that is taken would have been noticed"


def test_counts_the_memory_of_past_losses(uncompiled, tmp_path):
    """Each of eight times has ten losses, their count and a probability; and the last step."""
    found = passes(config(loss__time_sampler="loss_second_moment"), tmp_path)["parameters"]
    assert found.endswith(f" {STATE_BYTES + 4 * (8 * (10 + 1 + 1) + 1)} bytes")


@pytest.mark.parametrize(("parallel", "num_devices", "accumulate"), [("jit", 1, 2), ("pmap", 4, 1)])
def test_estimates_the_memory_of_a_step(tmp_path, monkeypatch, parallel, num_devices, accumulate):
    """It takes at least the state, and this device's share of the images and their labels."""
    mesh = make_mesh(devices=jax.devices()[:num_devices])
    monkeypatch.setattr(preflight, "make_mesh", lambda *_: mesh)
    fields = {"training__batch_size": 32, "training__accumulate": accumulate}
    found = passes(config(parallel=parallel, **fields), tmp_path)
    assert found["devices"].startswith(f"{num_devices} × ")
    number, unit, *rest = found["train step"].partition("; ")[2].split()
    assert rest == ["a", "device"]
    needed = float(number) * {"bytes": 1, "kB": 1e3}[unit]
    assert STATE_BYTES + 32 // num_devices * (IMAGE_BYTES + 4) <= needed < 1e6


@pytest.mark.usefixtures("uncompiled")
class TestRunInTheWorkdir:
    @pytest.fixture(scope="class")
    @staticmethod
    def finished(tmp_path_factory):
        """The folder that a run of four steps leaves."""
        workdir = tmp_path_factory.mktemp("finished")
        check = Preflight(config(), workdir)
        for prepare in (check.devices, check.data, check.parameters):
            prepare()
        save_identity(workdir, check.config, check.source.spec)
        with preflight.Checkpoints(workdir, keep_last=1, keep_every=0) as checkpoints:
            checkpoints.save(4, to_items(check.state), check.config, {})
        return workdir

    @pytest.fixture
    @staticmethod
    def run(finished, tmp_path):
        return shutil.copytree(finished, tmp_path / "run")

    def test_goes_on_and_is_left_as_it_was(self, run):
        before = everything(run)
        found = passes(config(training__num_steps=5), run)
        assert found["checkpoints"].endswith("; training goes on after step 4")
        assert everything(run) == before

    @pytest.mark.parametrize(
        ("field", "value", "named"),
        [
            ("seed", 1, "seed 0 → 1"),
            ("training__learning_rate", 0.5, "training.learning_rate"),
            ("loss__time_sampler", "loss_second_moment", "loss.time_sampler"),
        ],
    )
    def test_must_be_the_same(self, run, field, value, named):
        before = everything(run)
        assert named in fails("data", config(**{field: value}), run)
        assert everything(run) == before

    def test_has_room_for_what_it_holds_already(self, run, monkeypatch):
        free = 2 * STATE_BYTES  # for one more of the last two, and one being written
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        passes(config(training__num_steps=5, training__keep_last=2), run)

    def test_that_a_killed_check_has_left_something_in(self, run):
        """It is removed, unless that check is still at work."""
        (run / ".check-killed" / "checkpoints").mkdir(parents=True)
        with preflight._trial(run) as at_work:
            passes(config(training__num_steps=5), run)
            assert [*run.glob(".*")] == [at_work]
        assert [*run.glob(".*")] == []

    @pytest.mark.parametrize(
        "replace", [pathlib.Path.touch, lambda path: path.symlink_to(path)], ids=["file", "link"]
    )
    def test_must_have_a_folder_of_checkpoints_that_can_be_read(self, run, replace):
        (run / "checkpoints").rename(run / "moved")
        replace(run / "checkpoints")
        assert "cannot be read" in fails("write access", config(training__num_steps=5), run)

    def test_must_not_have_lost_its_checkpoints(self, run):
        (run / "checkpoints").rename(run / "moved")
        assert "checkpoints are gone" in fails("write access", config(training__num_steps=5), run)

    def test_must_not_be_past_its_end(self, run):
        line = fails("checkpoints", config(training__num_steps=3), run)
        assert "4 steps are done; raise training.num_steps" in line

    def test_goes_on_after_its_newest_whole_checkpoint(self, run):
        shutil.copytree(run / "checkpoints" / "4", run / "checkpoints" / "5")
        (run / "checkpoints" / "5" / "manifest.json").unlink()
        with pytest.warns(UserWarning, match="checkpoint 5 is damaged"):
            found = passes(config(training__num_steps=6), run)
        assert found["checkpoints"].endswith("; training goes on after step 4")

    def test_must_have_a_whole_checkpoint(self, run):
        (run / "checkpoints" / "4" / "manifest.json").unlink()
        with pytest.warns(UserWarning, match="checkpoint 4 is damaged"):
            line = fails("data", config(training__num_steps=6), run)
        assert "every checkpoint is damaged" in line


@pytest.mark.usefixtures("uncompiled")
class TestFailures:
    @pytest.mark.parametrize(
        ("field", "value", "named"),
        [
            ("training__batch_size", 6, "config.training.batch_size is 6"),
            ("training__batch_size", 0, "config.training.batch_size is 0"),
            ("process__name", "linaer", "linear"),
            ("parallel", "xmap", "jit, pmap"),
            ("fsdp", 10**9, "config.fsdp is 1000000000; it must be a divisor of the 4 devices"),
        ],
    )
    def test_settings(self, tmp_path, field, value, named):
        workdir = tmp_path / "run"
        assert named in fails("settings", config(**{field: value}), workdir)
        assert not workdir.exists()

    @pytest.mark.parametrize("workdir", ["/proc/run", "{tmp}/file", "{tmp}/file/run"])
    def test_write_access(self, tmp_path, workdir):
        (tmp_path / "file").write_text("")
        workdir = pathlib.Path(workdir.format(tmp=tmp_path))
        line = fails("write access", config(), workdir)
        assert line.startswith(f"--workdir={workdir}: cannot be written")

    def test_missing_data(self, tmp_path):
        fields = {"data__source": "npz", "data__path": str(tmp_path / "no.npz")}
        assert "no.npz" in fails("data", config(**fields), tmp_path)

    def test_data_that_the_network_does_not_fit(self, tmp_path):
        line = fails("parameters", config(model__channel_multipliers=(1, 1, 1, 1, 1)), tmp_path)
        assert "config.model.channel_multipliers" in line

    def test_no_run_to_start_from(self, tmp_path):
        line = fails("parameters", config(init_from=str(tmp_path)), tmp_path)
        assert f"config.init_from={tmp_path}" in line

    @pytest.mark.parametrize("keep_last", [1, 3])
    def test_room_for_the_last_checkpoints_and_one_being_written(
        self, tmp_path, monkeypatch, keep_last
    ):
        settings = config(training__keep_last=keep_last, training__keep_every=0)
        needed = STATE_BYTES * (keep_last + 1)
        self.leave_room(monkeypatch, needed - 1)
        line = fails("checkpoints", settings, tmp_path)
        assert line.startswith(f"--workdir={tmp_path}: ")
        assert f"{keep_last + 1} checkpoints take {needed} bytes" in line
        assert everything(tmp_path) == {}
        self.leave_room(monkeypatch, needed)
        passes(settings, tmp_path)

    def test_room_for_checkpoints_that_are_kept_for_good(self, tmp_path, monkeypatch):
        """These are at steps 10, 20, 30 and 40."""
        steps = {"num_steps": 40, "keep_last": 2, "keep_every": 10, "checkpoint_every": 5}
        settings = config(**{f"training__{name}": value for name, value in steps.items()})
        self.leave_room(monkeypatch, STATE_BYTES * (2 + 2))
        fails("checkpoints", settings, tmp_path)
        self.leave_room(monkeypatch, STATE_BYTES * (2 + 1 + 4))
        passes(settings, tmp_path)

    @staticmethod
    def leave_room(monkeypatch, free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))

    @pytest.mark.parametrize("part", ["step", "params", "ema", "opt_state"])
    def test_checkpoint_that_reads_back_differently(self, tmp_path, monkeypatch, part):
        class Forgetful(preflight.Checkpoints):
            def restore(self, items):
                step, items, progress = super().restore(items)
                parts = {"step": step} | items
                parts[part] = jax.tree.map(lambda leaf: leaf + 1, parts[part])
                return parts.pop("step"), parts, progress

        monkeypatch.setattr(preflight, "Checkpoints", Forgetful)
        assert "read back differently" in fails("checkpoints", config(), tmp_path)
        assert everything(tmp_path) == {}

    def test_checkpoint_that_cannot_be_written(self, tmp_path, monkeypatch):
        class Full(preflight.Checkpoints):
            def save(self, *arguments):
                raise self._failure(OSError("no space left"))

        monkeypatch.setattr(preflight, "Checkpoints", Full)
        assert "no space left" in fails("checkpoints", config(), tmp_path)
        assert everything(tmp_path) == {}

    @pytest.mark.parametrize("limit", [19, 20])
    def test_device_memory(self, tmp_path, monkeypatch, limit):
        """Arguments, temporaries and output, less what they share."""
        stats = {"bytes_limit": limit, "bytes_in_use": 0}
        monkeypatch.setattr(type(jax.devices()[0]), "memory_stats", lambda self: stats)
        if limit == 20:
            found = passes(config(), tmp_path)
            assert found["train step"].endswith("20 bytes a device of 20 bytes")
        else:
            line = fails("train step", config(), tmp_path)
            assert "takes 20 bytes a device, which has 19 bytes" in line
            assert "training.accumulate" in line

    def test_whatever_it_is_leaves_no_row_open(self, tmp_path, monkeypatch):
        def refuse(*arguments):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too large")

        monkeypatch.setattr(preflight, "compile_step", refuse)
        _, rows, error = outcome(config(), tmp_path)
        assert "RESOURCE_EXHAUSTED" in str(error)
        assert rows["train step"] == "FAILED"


@pytest.mark.parametrize("number", range(len(CHECKS)))
def test_stops_before_any_check(tmp_path, number):
    polls = iter(range(number))

    def poll():
        if next(polls, None) is None:
            raise Stopped("SIGTERM")

    _, rows, error = outcome(config(), tmp_path, poll)
    assert isinstance(error, Stopped)
    assert tuple(rows) == CHECKS[:number]
    assert everything(tmp_path) == {}
