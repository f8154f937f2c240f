"""The command line as users run it, nearly always in this process."""

import configparser
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
from command import ROOT, mistake, succeeds
from PIL import Image, ImageSequence

from jax_ddpm import factory
from jax_ddpm.api.arguments import ARGUMENTS
from jax_ddpm.cli.flags import FLAGS, MODES
from jax_ddpm.cli.modes import RUN
from jax_ddpm.config.fields import fields, tables
from jax_ddpm.config.reading import shipped

TINY = [
    "--config.model.base_channels=8",
    "--config.model.channel_multipliers=(1,)",
    "--config.model.attention_resolutions=()",
    "--config.model.num_res_blocks=1",
    "--config.model.num_groups=4",
    "--config.process.num_timesteps=8",
    "--config.training.num_steps=4",
    "--config.training.batch_size=8",
    "--config.training.log_every=2",
    "--config.training.heldout_every=2",
    "--config.training.heldout_examples=20",
    "--config.training.sample_every=2",
    "--config.training.checkpoint_every=2",
    "--config.sampling.num_samples=20",
    "--config.sampling.batch_size=12",
]

HEADS = 14  # pixels of the line of class names above a grid


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image)


def grid_shape(rows, columns, size=64, gap=4):
    return (rows * (size + gap) + gap, columns * (size + gap) + gap)


quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("main")


@pytest.fixture(scope="module")
def runs(folder):
    """Configs trained for four steps: config name → the last picture."""

    def train(name):
        flags = [f"--config={name}", *TINY]
        if name == "digits_conditional":
            flags.append(f"--workdir={folder / 'conditional'}")
        return folder / written(*flags, cwd=folder)

    def make_network(module, x, *_):
        return tiny.network(x.shape[-1], module.num_classes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "make_network", make_network)
        names = ["digits", "digits_conditional", "digits_self_conditioned"]
        yield {name: train(name) for name in names}


def written(*flags, **options):
    """The path that a successful command prints."""
    (line,) = succeeds(*flags, **options)
    return pathlib.Path(line)


@pytest.fixture(scope="module")
def digits(runs):
    """The workdir that a run gets by default."""
    last_picture = runs["digits"]
    workdir = last_picture.parent.parent
    assert workdir.parts[-2:] == ("runs", "digits")
    return workdir


@pytest.fixture(scope="module")
def conditional(runs, folder):
    return folder / "conditional"


class TestTrain:
    def test_leaves_samples_and_records(self, runs, digits):
        assert runs["digits"] == digits / "samples" / "step_0000004.png"
        assert picture(runs["digits"]).shape == grid_shape(rows=4, columns=5)
        assert len([*(digits / "samples").iterdir()]) == 2
        assert {path.name for path in (digits / "checkpoints").iterdir()} == {"2", "4"}
        assert [*(digits / "tensorboard").iterdir()]

    def test_logs_what_a_researcher_watches(self, digits):
        lines = [*map(json.loads, (digits / "metrics.jsonl").read_text().splitlines())]
        names = set().union(*lines)
        assert names >= {
            "step",
            "loss",
            "gradient_norm",
            "parameter_norm",
            "learning_rate",
            "images_per_second",
            "heldout_loss",
        }
        assert names & {f"loss_quarter{i}" for i in (1, 2, 3, 4)}
        assert names & {f"heldout_loss_quarter{i}" for i in (1, 2, 3, 4)}
        assert all(math.isfinite(value) for line in lines for value in line.values())
        assert [line["step"] for line in lines if "heldout_loss" in line] == [2, 4]

    def test_conditional_grids_have_a_column_for_each_class(self, runs):
        headed = picture(runs["digits_conditional"])
        assert headed[HEADS:].shape == grid_shape(rows=2, columns=10)
        assert all(headed[:HEADS, column : column + 64].min() < 128 for column in range(4, 684, 68))


class TestSample:
    def test_shows_the_making_of_each_image(self, digits):
        """A row of x_t over a row of the predicted x_0, which end alike; put into the workdir."""
        flags = ["--num_samples=2", "--progressive=4"]
        path = written("--mode=sample", f"--workdir={digits}", *flags)
        assert path == digits / "samples.png"
        pixels = picture(path)
        assert pixels.shape == grid_shape(rows=4, columns=4)
        last_column = pixels[:, -68:]
        np.testing.assert_array_equal(last_column[:68], last_column[68:136])

    def test_same_seed_same_file(self, runs, conditional, folder):
        """The last picture of training comes back to the last bit, and so does the file."""
        out = folder / "new" / "again.png"
        flags = ["--num_samples=20", "--seed=0", f"--out={out}"]
        assert written("--mode=sample", f"--workdir={conditional}", *flags) == out
        np.testing.assert_array_equal(picture(out), picture(runs["digits_conditional"]))
        before = out.read_bytes()
        written("--mode=sample", f"--workdir={conditional}", *flags)
        assert out.read_bytes() == before

    def test_of_one_class(self, runs, conditional, folder):
        """Sample 3 of a mixed grid is of class 3, so there the two agree."""
        out = folder / "class.png"
        flags = ["--num_samples=4", "--class=3", f"--out={out}"]
        written("--mode=sample", f"--workdir={conditional}", *flags)
        threes, mixed = picture(out), picture(runs["digits_conditional"])[HEADS:]
        assert threes.shape == grid_shape(rows=2, columns=2)
        fourth = mixed[4:68, 4 + 3 * 68 :][:, :64]
        np.testing.assert_allclose(threes[-68:-4, -68:-4].astype(int), fourth, atol=1)

    def test_of_a_self_conditioned_model_in_continuous_time(self, runs, folder):
        """The config's way of sampling draws the picture of training again, another way others."""
        picture_of_training = runs["digits_self_conditioned"]
        workdir, out = picture_of_training.parent.parent, folder / "told.png"
        flags = [f"--workdir={workdir}", "--num_samples=20", f"--out={out}"]
        written("--mode=sample", *flags)
        np.testing.assert_array_equal(picture(out), picture(picture_of_training))
        line = mistake("--mode=sample", *flags, "--sampling.eta=0")
        assert line.startswith(f"--out={out} was made with ")
        out.unlink()
        written("--mode=sample", *flags, "--sampling.eta=0")
        assert np.any(picture(out) != picture(picture_of_training))

    def test_in_other_ways_than_the_run_says(self, digits, folder):
        """The short flags and their fields say how; the record beside the samples notes it."""
        flags = ["--mode=sample", f"--workdir={digits}", "--num_samples=2"]
        short, long = folder / "short.npz", folder / "long.npz"
        written(*flags, "--sampler=ddim", "--num_steps=3", f"--out={short}")
        fields = ["--sampling.sampler=ddim", "--sampling.num_steps=3"]
        written(*flags, *fields, "--sampling.times=()", f"--out={long}")
        with np.load(short) as one, np.load(long) as other:
            np.testing.assert_array_equal(one["images"], other["images"])
        records = [json.loads((folder / f"{out.name}.json").read_text()) for out in (short, long)]
        assert records[0] == records[1]
        assert (records[0]["sampler"], records[0]["num_steps"]) == ("ddim", 3)

    def test_as_a_film(self, digits, folder):
        path = written(
            "--mode=sample",
            f"--workdir={digits}",
            "--num_samples=2",
            "--progressive=5",
            "--sampler=heun",
            "--sampling.grid=karras",
            "--num_steps=4",
            f"--out={folder / 'film.gif'}",
        )
        with Image.open(path) as film:
            frames = ImageSequence.Iterator(film)
            # Where nothing changes two moments become one longer frame.
            assert sum(frame.info["duration"] for frame in frames) == 4 * 800 + 2000

    def test_with_the_optimal_variance_once_it_is_estimated(self, digits, folder):
        flags = [f"--workdir={digits}", "--num_examples=20"]
        path = written("--mode=variance", *flags)
        assert path == digits / "checkpoints" / "4" / "x0_error_ema.json"
        statistic = path.read_bytes()
        pictures = []
        for name, field in (("plain", []), ("optimal", ["--sampling.variance=optimal"])):
            out = folder / f"{name}.png"
            flags = [f"--workdir={digits}", "--num_samples=4", f"--out={out}"]
            written("--mode=sample", *flags, *field)
            pictures.append(picture(out))
        assert np.any(pictures[0] != pictures[1])
        assert path.read_bytes() == statistic


DIGITS = "--config=configs/digits.py"
SAMPLE = ["--mode=sample", "--workdir={digits}"]
CONDITIONAL = ["--mode=sample", "--workdir={conditional}"]
MANUAL = ["--distributed=manual", "--num_processes=2"]
HEAD = "from jax_ddpm.config import default\n\ndef get_config():\n    config = default()\n"
FILES = {
    "unknown_field.py": HEAD + "    config.model.base_chanels = 8\n",
    "wrong_type.py": HEAD + "    config.training.num_steps = 'many'\n",
    "syntax.py": "def get_config(:\n",
    "empty.py": "",
    "raises.py": "def get_config():\n    return {}['a']\n",
    "text.npz": "no arrays",
    "cifar-10-python.tar.gz": "no archive",
    "pictures/notes.txt": "no picture",
    "full/file": "",
    "unfinished/config.json": "{}",
    "damaged.json": "{",
    "other.json": '{"no_such_field": 1}',
    "list.json": "[]",
    "deep.json": "[" * 100_000,
    "number_of_modules.json": '{"modules": 3}',
    "nothing.py": "def get_config():\n    pass\n",
    "dict.py": "def get_config():\n    return {}\n",
    "modules.py": "from ml_collections import ConfigDict\n\ndef get_config():\n"
    "    return ConfigDict({'modules': 3})\n",
    "exits.py": "import sys\ndef get_config():\n    sys.exit()\n",
}
# What is wrong: flags, and what the message must name.
WRONG = {
    "nothing": ([], "--config"),
    "leftover_argument": ([DIGITS, "training.num_steps=5"], "training.num_steps=5"),
    "unknown_flag": ([DIGITS, "--nun_samples=3"], "nun_samples"),
    "unknown_mode": ([DIGITS, "--mode=evaluate"], "mode"),
    "negative_seed": ([*SAMPLE, "--seed=-1"], "seed"),
    "no_samples": ([*SAMPLE, "--num_samples=0"], "num_samples"),
    "endless_samples": ([*SAMPLE, "--num_samples=1000000000"], "--num_samples=1000000000: it must"),
    # config files
    "no_config_file": (["--config=configs/nothing.py"], "configs/nothing.py"),
    "config_with_unknown_field": (["--config={files}/unknown_field.py"], "field.py, line 5"),
    "config_with_wrong_type": (["--config={files}/wrong_type.py"], "type.py, line 5"),
    "config_with_wrong_syntax": (["--config={files}/syntax.py"], "syntax.py, line 1"),
    "config_that_raises": (["--config={files}/raises.py"], "raises.py, line 2: KeyError"),
    "config_that_returns_a_dict": (["--config={files}/dict.py"], "returns a ConfigDict"),
    "config_that_exits": (["--config={files}/exits.py"], "exits.py, line 3: SystemExit"),
    "config_with_a_module_that_is_a_number": (["--config={files}/modules.py"], "list of names"),
    "config_without_function": (["--config={files}/empty.py"], "get_config"),
    # fields
    "unknown_field": ([DIGITS, "--config.model.base_chanels=8"], "base_chanels"),
    "unknown_section": (
        [DIGITS, "--config.modle.base_channels=8"],
        "--config: unknown field 'modle'",
    ),
    "mistyped_value": ([DIGITS, "--config.seed=zero"], "seed"),
    "float_for_an_integer": ([DIGITS, "--config.training.num_steps=1e3"], "num_steps"),
    "list_given_twice": (
        [DIGITS, *["--config.model.channel_multipliers=(1,)"] * 2],
        "--config.model.channel_multipliers: it is given twice",
    ),
    "bad_value": ([DIGITS, "--config.training.batch_size=0"], "config.training.batch_size"),
    "negative_chain": ([DIGITS, "--config.process.num_timesteps=-5"], "num_timesteps"),
    "groups_do_not_divide": ([DIGITS, "--config.model.num_groups=7"], "config.model.num_groups"),
    "parts_do_not_divide": ([DIGITS, "--config.training.accumulate=5"], "training.batch_size"),
    "unknown_schedule": ([DIGITS, "--config.process.name=linaer"], "linear"),
    "unknown_target": ([DIGITS, "--config.parameterisation.target=eta"], "eps"),
    "unknown_parallel": ([DIGITS, "--config.parallel=xmap"], "pmap"),
    "untrained_variance": ([DIGITS, "--config.parameterisation.variance=learned"], "loss.kind"),
    "size_does_not_divide": (
        [DIGITS, "--config.model.channel_multipliers=(1, 1, 1, 1, 1)"],
        "config.model.channel_multipliers",
    ),
    "no_such_height": (
        [DIGITS, "--config.model.attention_resolutions=(16,)"],
        "config.model.attention_resolutions",
    ),
    # data
    "no_data_path": ([DIGITS, "--config.data.source=npz"], "config.data.path"),
    "no_data_file": (["--config=configs/cifar10.py", "--config.data.path=no.tar"], "no.tar"),
    "no_npz": ([DIGITS, "--config.data.source=npz", "--config.data.path={files}/text.npz"], "text"),
    "wrong_checksum": (["--config=configs/cifar10.py", "--config.data.path={files}"], "cifar-10"),
    "no_idx_files": (
        ["--config=configs/fashion_mnist.py", "--config.data.path={files}"],
        "train-images-idx3-ubyte",
    ),
    "no_pictures": (
        ["--config=configs/folder64.py", "--config.data.path={files}/pictures"],
        "pictures",
    ),
    "unknown_tfds_name": (
        [DIGITS, "--config.data.source=tfds", "--config.data.name=cifar11"],
        "cifar10",
    ),
    # starting parameters
    "no_run_to_start_from": ([DIGITS, "--config.init_from=configs"], "configs"),
    "start_from_another_network": (
        [DIGITS, "--config.init_from={conditional}", "--workdir={new}"],
        "does not fit: ",
    ),
    # workdirs
    "workdir_is_a_file": ([DIGITS, "--workdir=setup.cfg"], "setup.cfg"),
    "workdir_cannot_be_written": ([DIGITS, "--workdir=/proc/run"], "/proc/run"),
    "another_run": ([DIGITS, *TINY, "--config.seed=1", "--workdir={digits}"], "seed 0 → 1"),
    "fewer_steps_than_done": (
        [DIGITS, *TINY, "--config.training.num_steps=3", "--accept_changes", "--workdir={digits}"],
        "training.num_steps",
    ),
    "no_workdir": (["--mode=sample"], "--workdir"),
    "empty_workdir": (["--mode=sample", "--workdir=configs"], "configs"),
    "workdir_to_sample_is_a_file": (["--mode=sample", "--workdir=setup.cfg"], "setup.cfg"),
    "damaged_config": (["--mode=sample", "--workdir={files}/unfinished"], "unfinished"),
    "no_checkpoint": (["--mode=sample", "--workdir={bare}"], "no checkpoint"),
    "no_such_checkpoint": ([*SAMPLE, "--checkpoint_step=3"], "checkpoints at 2, 4"),
    "damaged_checkpoints": (["--mode=sample", "--workdir={damaged}"], "damaged"),
    # samples
    "out_is_a_folder": ([*SAMPLE, "--out={files}/full/a.png"], "a.png"),
    "out_of_unknown_kind": ([*SAMPLE, "--out=samples.jpg"], "samples.jpg"),
    "out_holds_something_else": ([*SAMPLE, "--out={files}/full"], "full"),
    "unknown_class": ([*CONDITIONAL, "--class=10"], "0 to 9"),
    "no_classes": ([*SAMPLE, "--class=1"], "--class"),
    "too_many_moments": ([*SAMPLE, "--progressive=9"], "8"),
    "film_is_a_folder": ([*SAMPLE, "--out={files}/full/film.gif"], "film.gif"),
    # how to sample
    "unknown_sampler": ([*SAMPLE, "--sampler=dpmpp"], "dpmpp_2m"),
    "unknown_grid": ([*SAMPLE, "--sampling.grid=cosine"], "karras"),
    "unknown_process": ([*SAMPLE, "--sampling.process=cosine"], "vp_cosine"),
    "unknown_sampling_field": ([*SAMPLE, "--sampling.etaa=1"], "--sampling: unknown field 'etaa'"),
    "field_of_a_sampling_field": ([*SAMPLE, "--sampling.eta.foo=1"], "eta.foo"),
    "mistyped_sampling_value": ([*SAMPLE, "--sampling.eta=half"], "--sampling.eta=half"),
    "float_for_a_number_of_steps": ([*SAMPLE, "--num_steps=1e3"], "num_steps"),
    "words_for_times": ([*SAMPLE, "--sampling.times=a,b"], "config.sampling.times"),
    "number_for_a_section": ([*SAMPLE, "--sampling=3"], "sampling"),
    "option_of_another_sampler": ([*SAMPLE, "--sampling.eta=0.5"], "for ddim, dpmpp_2m_sde"),
    "more_steps_than_the_chain": ([*SAMPLE, "--num_steps=9"], "process.num_timesteps = 8"),
    "guidance_without_classes": ([*SAMPLE, "--guidance_scale=2"], "config.sampling.guidance_scale"),
    "away_from_no_class": (
        [*CONDITIONAL, "--guidance_scale=2", "--sampling.negative_class=10"],
        "0 to 9",
    ),
    "variance_is_not_estimated": ([*CONDITIONAL, "--sampling.variance=optimal"], "--mode=variance"),
    "variance_of_what": (["--mode=variance"], "--workdir"),
    "both_kinds_of_parameters": ([*SAMPLE, "--ema", "--raw"], "--raw"),
    # several processes
    "unknown_way_to_join": (["--distributed=slurm"], "manual"),
    "half_an_address": (["--distributed=manual", "--num_processes=2"], "--coordinator=host:port"),
    "address_for_nobody": (["--coordinator=localhost:1234"], "--distributed=manual"),
    "no_port": ([*MANUAL, "--coordinator=localhost", "--process_id=0"], "--coordinator=localhost:"),
    "one_too_many": ([*MANUAL, "--coordinator=localhost:1", "--process_id=2"], "0 to 1"),
    "no_processes": (["--num_processes=0"], "num_processes"),
    # said of flags themselves
    "misspelt_mode": ([DIGITS, "--mode=smaple"], "did you mean sample?"),
    "misspelt_flag": ([*SAMPLE, "--num_smaples=3"], "did you mean --num_samples?"),
    "flag_without_value": ([*SAMPLE, "--seed"], "--seed: its value is missing"),
    "config_without_value": (["--config="], "--config: its value is missing"),
    "word_for_a_number": ([*SAMPLE, "--seed=one"], "--seed=one: it must be a whole number"),
    "seed_beyond_32_bits": ([*SAMPLE, "--seed=4294967296"], "--seed=4294967296: it must be in"),
    "no_batch": ([*SAMPLE, "--sample_batch=0"], "--sample_batch=0: it must be in [1"),
    "negative_batch": ([*SAMPLE, "--sample_batch=-4"], "--sample_batch=-4: it must be"),
    "no_moments": ([*SAMPLE, "--progressive=0"], "--progressive=0: it must be at least 1"),
    "word_for_a_scale": ([*SAMPLE, "--guidance_scale=big"], "--guidance_scale=big: it must be a n"),
    "flag_of_another_mode": ([DIGITS, "--num_seeds=2"], "it is for --mode=eval"),
    "field_without_config": (["--config.seed=3"], "--config=digits --config.seed=3"),
    "section_for_a_field": ([DIGITS, "--config.model=3"], "--config.model=3: it is a section"),
    "place_in_a_field": ([DIGITS, "--config.model.channel_multipliers[0]=2"], "multipliers[0]'"),
    "section_with_unknown_field": (
        [DIGITS, "--config.model={{'dropuot': 0.5}}"],
        "it is a section",
    ),
    "no_flagfile": (["--flagfile=nowhere"], "nowhere"),
    "word_for_true": ([DIGITS, "--config.data.flip=ja"], "flip=ja: it must be True or False"),
    "negative_process": (["--distributed=manual", "--process_id=-1"], "--process_id=-1"),
    # configs by name
    "misspelt_config": (["--config=digit"], "; did you mean digits?"),
    "unknown_config": (["--config=mnist"], "nor one of celebahq256, cifar10, digits,"),
    "unknown_config_file": (["--config=nowhere/digits.py"], "; did you mean digits?"),
    "unknown_config_to_explain": (["--help", "--config=digit"], "; did you mean digits?"),
    "field_to_explain": (["--help", DIGITS, "--config.sede=3"], "unknown field 'sede'; did you me"),
    "config_is_a_folder": (["--config=configs"], "--config=configs: no such file"),
    "json_is_damaged": (["--config={files}/damaged.json"], "damaged.json: damaged"),
    "json_of_another_version": (
        ["--config={files}/other.json"],
        "other.json has no_such_field, which is unknown here: it is from an",
    ),
    "json_is_endless": (["--config={files}/deep.json"], "deep.json: damaged"),
    "json_with_a_number_of_modules": (
        ["--config={files}/number_of_modules.json"],
        "config.modules is 3; it must be a list of names",
    ),
    "json_is_no_config": (["--config={files}/list.json"], "list.json: damaged"),
    "config_returns_nothing": (
        ["--config={files}/nothing.py"],
        "nothing.py: has no function get",
    ),
    "job_for_a_comparison": (["--mode=compare", "--process_id=1"], "--process_id does nothing"),
}


@pytest.fixture(scope="module")
def places(folder, digits, conditional):
    """The files of the flags above, made to be wrong."""
    files, bare, damaged = folder / "files", folder / "bare", folder / "damaged"
    for name, text in FILES.items():
        (files / name).parent.mkdir(parents=True, exist_ok=True)
        (files / name).write_text(text)
    (files / "full" / "a.png").mkdir()
    (files / "full" / "film.gif").mkdir()
    for workdir in (bare, damaged):
        shutil.copytree(digits, workdir)
    shutil.rmtree(bare / "checkpoints")
    for manifest in damaged.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{")
    return {
        "files": files,
        "digits": digits,
        "conditional": conditional,
        "bare": bare,
        "damaged": damaged,
        "new": folder / "new",
    }


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_one_line(places, folder, name):
    flags, named = WRONG[name]
    assert named in mistake(*(flag.format(**places) for flag in flags))


def test_the_list_of_mistakes_only_grows():
    assert len(WRONG) >= 104


class TestConfig:
    def test_by_name_path_or_a_runs_own_is_the_same(self, digits, folder):
        """The difference from the run there tells which config was read."""
        flags = [*TINY, "--config.seed=1", f"--workdir={digits}"]
        ways = ["digits", ROOT / "configs" / "digits.py", digits / "config.json"]
        told = {mistake(f"--config={way}", *flags, cwd=folder) for way in ways}
        assert len(told) == 1
        assert "holds a run that differs: seed 0 → 1;" in told.pop()

    def test_of_a_run_resumes_it(self, runs, digits, folder):
        assert folder / written("--config=runs/digits/config.json", cwd=folder) == runs["digits"]


class TestHelp:
    @pytest.mark.parametrize("flag", ["--help", "-h", "--helpfull", "--helpshort", "--mode=help"])
    def test_lists_every_flag_under_its_modes(self, flag):
        lines = succeeds(flag)
        for name in MODES:
            assert any(line.startswith(f"--mode={name} ") for line in lines)
        listed = {line.split()[0] for line in lines if line.startswith("  --")}
        assert listed == {f"--{name}" for name in FLAGS if name != "mode"}
        assert max(map(len, lines)) <= 100

    def test_of_a_config_lists_its_fields(self):
        text = "\n".join(succeeds("--help", "--config=digits", "--config.seed=3"))
        for name, option in fields().items():
            assert f"  --config.{name}=" in text
            assert option.meaning.split()[0] in text
        assert "--config.seed=3 (default 0)" in text
        assert "--config.training.num_steps=2000 (default 800000)" in text

    def test_choices_are_all_that_tables_hold(self):
        text = "\n".join(succeeds("--mode=choices"))
        for field, table in tables().items():
            assert f"--config.{field}\n" in text
            assert all(f"  {name}" in text for name in table)
        for name in ("memorisation", "inpaint", "efficientnet_lite0", *shipped()):
            assert name in text


def test_every_mode_is_a_function_and_takes_known_flags():
    assert RUN.keys() == MODES.keys()
    assert {name for mode in MODES.values() for name in mode.takes} <= FLAGS.keys()
    assert ARGUMENTS.keys() <= FLAGS.keys()


class TestProcess:
    """Behaviour that only a new process can show."""

    @staticmethod
    def python(*arguments, **environment):
        command, env = [sys.executable, *map(str, arguments)], os.environ | environment
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)

    def test_success_is_exit_code_0(self, tmp_path):
        record = {"subject": {}, "measured": {"fid": {"protocol": {}, "result": {"value": 3.0}}}}
        for name in ("a", "b"):
            (tmp_path / f"{name}.json").write_text(json.dumps(record))
        records = [tmp_path / "a.json", tmp_path / "b.json"]
        result = self.python("-m", "jax_ddpm.main", "--mode=compare", *records)
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[1].split() == ["fid", "3", "3"]

    def test_a_terminal_of_ascii_shows_what_it_can(self, tmp_path):
        """A table, after all that was measured, does not fail for a ±."""
        result = {"value": 3.0, "std": 0.5}
        record = {"subject": {}, "measured": {"fid": {"protocol": {}, "result": result}}}
        (tmp_path / "ε.json").write_text(json.dumps(record))
        ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        flags = ["--mode=compare", tmp_path / "ε.json", tmp_path / "ε.json"]
        found = self.python("-m", "jax_ddpm.main", *flags, **ascii_only)
        assert found.returncode == 0, found.stderr
        assert found.stdout.count("3 \\xb1 0.5") == 2

    def test_a_mistake_is_exit_code_1(self):
        result = self.python("-m", "jax_ddpm.main", "--mode=sample", "--seed=-1")
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith("error: --seed=-1: it must be in ")
        assert result.stderr.count("\n") == 1

    @pytest.mark.parametrize("module", ["ml_collections", "jax", "jax_ddpm.api.run"])
    def test_ctrl_c_while_it_imports_is_one_line(self, module):
        program = f"""
import sys
class Interrupted:
    @staticmethod
    def find_spec(name, *_):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted)
sys.argv = ["jax_ddpm", "--mode=sample", "--workdir=no"]
from jax_ddpm.main import main
main()
"""
        result = self.python("-c", program)
        assert result.returncode == 1
        assert result.stderr.startswith("interrupted")
        assert result.stderr.count("\n") == 1

    def test_help_takes_less_than_a_second_and_loads_no_jax(self):
        program = (
            "import sys, time; start = time.process_time();"
            "sys.argv = ['jax_ddpm', '--help'];"
            "from jax_ddpm import main; main.main();"
            "print(time.process_time() - start, 'jax' in sys.modules, file=sys.stderr)"
        )
        seconds, loaded = self.python("-c", program).stderr.split()
        assert float(seconds) < 1
        assert loaded == "False"

    def test_importing_the_package_is_light(self):
        program = "import sys, jax_ddpm; print(*{name.partition('.')[0] for name in sys.modules})"
        loaded = set(self.python("-c", program).stdout.split())
        assert "jax_ddpm" in loaded
        heavy = {"jax", "flax", "optax", "orbax", "tensorflow", "sklearn", "numpy", "PIL"}
        assert not loaded & heavy

    def test_the_console_script_is_main(self):
        """Its module loads as quickly as it answers."""
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        script = setup["options.entry_points"]["console_scripts"]
        assert script.strip() == "jax_ddpm = jax_ddpm.main:main"
