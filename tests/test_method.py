"""The code of docs/method.md: a generator and a critic in two phases, by the loop of every run.

The generator is a small network of CONTRIBUTING.md, because it compiles fast.
"""

import functools
import importlib
import json
import os
import pathlib
import re
import shutil
import signal
import sys

import jax
import numpy as np
import pytest
import tiny
from command import Run
from jobs import free_port

import jax_ddpm
from jax_ddpm.config import default
from jax_ddpm.config.validation import validate
from jax_ddpm.errors import UserError
from jax_ddpm.models.table import NETWORKS
from jax_ddpm.runs import checkpoint
from jax_ddpm.runtime.stopping import Stopped
from jax_ddpm.tasks import table
from jax_ddpm.tasks.recipe import Average
from jax_ddpm.training import loop, prepare
from jax_ddpm.training.kept_averages import kept_averages
from jax_ddpm.training.preflight import Preflight

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)

ROOT = pathlib.Path(__file__).parent.parent
CODE = {
    name: code
    for page in ("docs/method.md", "CONTRIBUTING.md")
    for name, code in re.findall(
        r"```python\n# (\w+)\.py\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL
    )
}
MODULES = ("adversarial", "my_network")
ITEMS = ("params", "ema", "opt_state")
SMALL = {
    "model.name": "convnet",
    "model.width": 32,
    "model.depth": 1,
    "training.batch_size": 16,
    "training.num_steps": 12,
    "training.log_every": 4,
    "training.heldout_every": 6,
    "training.heldout_examples": 20,
    "training.sample_every": 12,
    "training.checkpoint_every": 5,
    "sampling.num_samples": 8,
    "sampling.batch_size": 8,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both modules, where Python finds them, and the run of a classifier."""
    folder = tmp_path_factory.mktemp("own")
    for name in (*MODULES, "adversarial_digits"):
        (folder / f"{name}.py").write_text(CODE[name])
    judge = tiny.config(
        task="classification",
        model__base_channels=32,
        model__channel_multipliers=(1,),
        model__attention_resolutions=(),
    )
    loop.train(judge, folder / "runs" / "digits_classifier")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    for name in (*MODULES, "adversarial_digits"):
        sys.modules.pop(name, None)
    table.TASKS.pop("adversarial", None)
    NETWORKS.pop("convnet", None)


@pytest.fixture(scope="module")
def make_config(folder):
    def make(**fields):
        config = default(*MODULES)
        page = importlib.import_module("adversarial_digits").get_config().to_dict()
        config.update(page | {"modules": MODULES})
        config.update_from_flattened_dict(SMALL | {"judge": str(folder / "runs/digits_classifier")})
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
        validate(config, num_devices=4)
        return config

    return make


@pytest.fixture(scope="module")
def run(make_config, folder):
    """A run that nothing disturbs."""
    loop.train(make_config(), folder / "runs" / "undisturbed")
    return folder / "runs" / "undisturbed"


def log(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) | {"images_per_second": 0} for line in lines]


def assert_same_run(one, other, **tolerance):
    """The log and the last state, bit by bit if no tolerance is given."""
    compare = functools.partial(np.testing.assert_allclose, **({"rtol": 0, "atol": 0} | tolerance))
    for line, expected in zip(log(one), log(other), strict=True):
        assert line.keys() == expected.keys()
        assert line == (pytest.approx(expected, rel=1e-3, abs=1e-3) if tolerance else expected)
    assert checkpoint.steps(one)[-1] == checkpoint.steps(other)[-1] == 12
    for item in ITEMS:
        trees = (checkpoint.restore_item(workdir, 12, item) for workdir in (one, other))
        jax.tree.map(compare, *trees)


class TestRun:
    def test_each_phase_has_its_part_of_the_log(self, run):
        """The generator runs at steps 0, 5 and 10, all others are the critic's alone."""
        first, heldout, *_ = log(run)
        for phase in ("critic", "generator"):
            parts = {f"{phase}/{name}" for name in ("loss", "gradient_norm", "learning_rate")}
            assert parts < first.keys()
        assert {"critic/distance", "generator/told", "parameter_norm"} < first.keys()
        assert heldout["step"] == 6
        assert heldout.keys() > {"heldout_loss", "heldout_told"}
        losses = [line for line in log(run) if "critic/loss" in line]
        assert [("generator/loss" in line) for line in losses] == [True, True, True]

    def test_checkpoints_hold_what_is_trained_and_nothing_frozen(self, run):
        assert checkpoint.restore_item(run, 12, "params").keys() == {"generator", "critic"}
        assert checkpoint.restore_item(run, 12, "ema").keys() == {"generator"}
        record = json.loads((run / "frozen.json").read_text())["judge"]
        assert record["checkpoint_step"] == 4
        assert len(record["sha256"]) == 64

    def test_the_average_of_the_generator_is_sampled(self, run):
        """In one step; the raw generator if it is asked for."""
        average, raw = (jax_ddpm.load(run, raw=raw) for raw in (False, True))
        for loaded, item in ((average, "ema"), (raw, "params")):
            expected = checkpoint.restore_item(run, 12, item)["generator"]
            jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)
        assert average.model.sampler().num_evaluations == 1
        assert average.sample(10).shape == (10, 8, 8, 1)

    @pytest.mark.slow
    @pytest.mark.parametrize("at", [3, 5, 11])
    def test_interrupted_ends_the_same_to_the_last_bit(self, run, make_config, tmp_path, at):
        def poll():
            polls.append(None)
            if len(polls) == at:
                raise Stopped("SIGTERM")

        polls = []
        with pytest.raises(Stopped):
            loop.train(make_config(), tmp_path, poll=poll)
        assert checkpoint.steps(tmp_path)[-1] < 12
        loop.train(make_config(), tmp_path)
        assert_same_run(tmp_path, run)

    @pytest.mark.slow
    def test_micro_batches_change_nothing(self, run, make_config, tmp_path):
        loop.train(make_config(training__accumulate=2), tmp_path)
        assert_same_run(tmp_path, run, rtol=1e-3, atol=1e-4)

    def test_is_checked_with_all_its_networks(self, make_config, tmp_path, capsys):
        Preflight(make_config(), tmp_path).run()
        shown = capsys.readouterr().out
        assert re.search(r"parameters .* averages and optimiser .*; frozen judge [\d.]+ kB", shown)
        assert "FAILED" not in shown


@pytest.mark.slow
class TestJudge:
    @pytest.fixture
    def judge(self, folder, tmp_path):
        return shutil.copytree(folder / "runs" / "digits_classifier", tmp_path / "judge")

    def test_may_move(self, make_config, run, judge, tmp_path):
        workdir = shutil.copytree(run, tmp_path / "run")
        loop.train(make_config(judge=str(judge), training__num_steps=13), workdir)
        assert checkpoint.steps(workdir)[-1] == 13

    def test_may_not_change(self, make_config, run, judge, tmp_path):
        """Its checkpoint of then is read; if that is another one, the run does not go on."""
        workdir = shutil.copytree(run, tmp_path / "run")
        settings = make_config(judge=str(judge), training__num_steps=13)
        longer = tiny.config(
            task="classification",
            model__base_channels=32,
            model__channel_multipliers=(1,),
            model__attention_resolutions=(),
            training__num_steps=5,
        )
        loop.train(longer, judge)
        record = json.loads((workdir / "frozen.json").read_text())
        loop.train(settings, workdir)
        assert json.loads((workdir / "frozen.json").read_text()) == record
        shutil.rmtree(judge / "checkpoints" / "4")
        settings.training.num_steps = 14
        with pytest.raises(UserError, match=r"^config.judge=.*: its checkpoint 4, .* is gone; "):
            loop.train(settings, workdir)
        with pytest.warns(UserWarning, match="not the parameters that .* began with"):
            loop.train(settings, workdir, accept_changes=True)

    def test_of_nothing_or_other_data_is_one_line(self, make_config, run, tmp_path):
        with pytest.raises(UserError, match=r"^config.judge is None; it must be given for task="):
            make_config(judge=None)
        for workdir in (tmp_path, run):
            with pytest.raises(UserError, match=r"^config.judge( is|=)") as caught:
                loop.train(make_config(judge=str(workdir)), tmp_path / "run")
            assert "\n" not in str(caught.value)


@pytest.mark.slow
class TestStart:
    def test_networks_are_drawn_apart(self, make_config, folder):
        """The first from the seed as in a run of one network."""
        source = jax_ddpm.factory.make_source(make_config())
        mesh = jax_ddpm.runtime.devices.make_mesh()
        prepared = prepare.prepare(make_config(), source.spec, mesh, folder / "nothing")
        key = jax_ddpm.keys.stream_key(jax.random.key(0), jax_ddpm.keys.Stream.PARAMETERS)
        expected = prepared.model.network.init(key)
        jax.tree.map(np.testing.assert_array_equal, prepared.state.params["generator"], expected)


# processes, devices in each, flags
LAYOUTS = {
    "one": (1, 1, ()),
    "fsdp": (1, 8, ("--config.fsdp=8",)),
    "pmap": (1, 8, ("--config.parallel=pmap",)),
    "two_processes": (2, 4, ("--config.fsdp=4",)),
}


def have(devices):
    """Sets up devices in the child."""
    jax.config.update("jax_num_cpu_devices", devices)


def start(folder, workdir, layout):
    """The run by the command line, in the processes of a layout."""
    count, devices, flags = LAYOUTS[layout]
    address = ["--distributed=manual", f"--coordinator=localhost:{free_port()}"]
    fields = [f"--config.{name}={value}" for name, value in SMALL.items()]
    return [
        Run(
            workdir.parent / f"{workdir.name}_output_{index}",
            f"--config={folder / 'adversarial_digits_small.py'}",
            f"--workdir={workdir}",
            *fields,
            *flags,
            *([*address, f"--num_processes={count}", f"--process_id={index}"] * (count > 1)),
            cwd=folder,
            prepare=functools.partial(have, devices),
        )
        for index in range(count)
    ]


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """The same run in every layout."""
    both = 'default("adversarial", "my_network")'
    page = CODE["adversarial_digits"].replace('default("adversarial")', both)
    (folder / "adversarial_digits_small.py").write_text(page)
    workdirs = {name: tmp_path_factory.mktemp(name) / "run" for name in LAYOUTS}
    for name, workdir in workdirs.items():
        for run in start(folder, workdir, name):
            result = run.result(600)
            assert result.returncode == 0, result.stderr
    return workdirs


@pytest.mark.slow
class TestLayouts:
    @pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
    def test_ends_as_on_one_device(self, runs, layout):
        """Up to the order of sums, which Adam magnifies."""
        assert_same_run(runs[layout], runs["one"], rtol=1e-2, atol=2e-4)

    def test_killed_goes_on_to_the_last_bit(self, folder, runs, tmp_path):
        (run,) = start(folder, tmp_path / "run", "fsdp")
        run.wait_for("step 8/12", seconds=600)
        os.kill(run.process.pid, signal.SIGKILL)
        run.result()
        assert checkpoint.steps(tmp_path / "run")[-1] < 12
        (again,) = start(folder, tmp_path / "run", "fsdp")
        assert again.result(600).returncode == 0
        assert_same_run(tmp_path / "run", runs["fsdp"])


@pytest.mark.slow
def test_averages_are_kept_at_many_steps(make_config, tmp_path):
    """A second average of the generator, every third step; also through an interruption."""
    config = make_config()
    row = table.TASKS["adversarial"]

    @functools.wraps(row.recipe)
    def recipe(*arguments, **options):
        made = row.recipe(*arguments, **options)
        kept = Average("generator", lambda step: 0.5, snapshot_every=3)
        return made._replace(averages=made.averages | {"fast": kept})

    dict.__setitem__(table.TASKS, "adversarial", row._replace(recipe=recipe))
    try:

        def poll():
            polls.append(None)
            if len(polls) == 7:
                raise Stopped("SIGTERM")

        polls = []
        with pytest.raises(Stopped):
            loop.train(config, tmp_path, poll=poll)
        loop.train(config, tmp_path)
    finally:
        dict.__setitem__(table.TASKS, "adversarial", row)
    folder = kept_averages(tmp_path)
    assert checkpoint.steps(folder) == [3, 6, 9, 12]
    last = checkpoint.restore_item(folder, 12, "ema")
    assert last.keys() == {"fast"}
    expected = checkpoint.restore_item(tmp_path, 12, "ema")["fast"]
    jax.tree.map(np.testing.assert_array_equal, last["fast"], expected)
