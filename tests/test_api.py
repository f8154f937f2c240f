"""jax_ddpm from Python: the same files and the same sentences as the command line's."""

import inspect
import json
import os
import signal

import command
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

import jax_ddpm
from jax_ddpm import factory
from jax_ddpm.api import arguments
from jax_ddpm.api import run as api
from jax_ddpm.api.arguments import ARGUMENTS, in_python, python_name
from jax_ddpm.api.run import Run
from jax_ddpm.config.reading import read_config
from jax_ddpm.errors import UserError
from jax_ddpm.images import load_png
from jax_ddpm.inference.edits import Request
from jax_ddpm.options import kind_of
from jax_ddpm.runtime.stopping import Stopped
from jax_ddpm.training import loop

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)
FAST = {
    "process.num_timesteps": 8,
    "training.num_steps": 4,
    "training.batch_size": 8,
    "training.log_every": 2,
    "training.heldout_every": 4,
    "training.heldout_examples": 20,
    "training.sample_every": 4,
    "training.checkpoint_every": 2,
    "sampling.num_samples": 12,
    "sampling.batch_size": 12,
}


@pytest.fixture(autouse=True, scope="module")
def small_networks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            factory,
            "make_network",
            lambda module, x, *_: tiny.network(x.shape[-1], module.num_classes),
        )
        patch.setattr(api.backend, "set_flags", lambda **_: None)  # XLA runs already
        yield


def config(**fields):
    result = read_config("digits_conditional").config
    result.update_from_flattened_dict(FAST | fields)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def workdir(small_networks, folder):
    jax_ddpm.train(config(), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def run(workdir):
    return jax_ddpm.load(workdir, num_steps=4)


@pytest.fixture(scope="module")
def images(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), dtype=np.uint8)
    np.savez(folder / "images.npz", images=pixels)
    return folder / "images.npz"


class TestTrain:
    def test_is_what_the_command_trains(self, workdir, folder):
        flags = [f"--config.{name}={value}" for name, value in FAST.items()]
        other = folder / "by_command"
        command.succeeds("--config=digits_conditional", f"--workdir={other}", *flags)
        picture = "samples/step_0000004.png"
        assert (other / picture).read_bytes() == (workdir / picture).read_bytes()
        assert (other / "config.json").read_bytes() == (workdir / "config.json").read_bytes()

    def test_goes_into_a_folder_of_the_configs_name(self, workdir, monkeypatch, tmp_path):
        asked = []

        def train(config, workdir, **_):
            asked.append(str(workdir))
            return workdir

        monkeypatch.setattr(loop, "train", train)
        monkeypatch.chdir(tmp_path)
        jax_ddpm.train("digits")
        jax_ddpm.train(command.ROOT / "configs" / "digits.py")
        jax_ddpm.train(workdir / "config.json")
        assert asked == ["runs/digits", "runs/digits", "runs/run"]

    def test_leaves_the_callers_config_as_it_is(self, monkeypatch, tmp_path):
        def train(config, workdir, **_):
            config.seed = 5
            return workdir

        monkeypatch.setattr(loop, "train", train)
        given = config()
        jax_ddpm.train(given, tmp_path)
        assert given == config()

    @pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_saves_everything_and_then_acts(self, monkeypatch, tmp_path, signal_):
        """Ctrl-C is a KeyboardInterrupt; what SIGTERM does is here made one."""
        monkeypatch.setattr(loop, "describe", lambda *_: os.kill(os.getpid(), signal_) or "")
        # SIGINT too: a shell's background job is started with it ignored.
        before = {s: signal.signal(s, signal.default_int_handler) for s in (2, 15)}
        try:
            with pytest.raises(KeyboardInterrupt):
                jax_ddpm.train(config(), tmp_path / "run")
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]

    def test_a_poll_of_ones_own_stops_it(self, tmp_path):
        def poll():
            raise Stopped("enough")

        with pytest.raises(Stopped, match="enough"):
            jax_ddpm.train(config(), tmp_path / "run", poll=poll)

    def test_check_trains_nothing(self, workdir, tmp_path, capsys):
        api.check(config(), tmp_path / "run")
        assert "train step" in capsys.readouterr().out
        assert not any((tmp_path / "run").iterdir())


class TestRun:
    def test_samples_are_those_of_the_command(self, run, workdir, folder):
        flags = [f"--workdir={workdir}", "--num_steps=4", "--num_samples=12", "--seed=3"]
        command.succeeds("--mode=sample", *flags, f"--out={folder / 'command.png'}")
        path = run.write_samples(folder / "python.png", 12, seed=3)
        assert path.read_bytes() == (folder / "command.png").read_bytes()
        run.write_samples(folder / "all", 12, seed=3)
        for i, image in enumerate(run.sample(12, seed=3)):
            np.testing.assert_array_equal(image, load_png(folder / "all" / f"{i:06}.png"))

    def test_edits_are_those_of_the_command(self, run, workdir, folder, images):
        flags = [f"--workdir={workdir}", "--num_steps=4", f"--images={images}", "--edit=sdedit"]
        flags += ["--num_samples=2", "--seed=3", "--class=1", f"--out={folder / 'command.npz'}"]
        command.succeeds("--mode=edit", *flags)
        settings = {"seed": 3, "num_samples": 2, "label": 1}
        path = run.write_edits(images, "sdedit", out=folder / "python.npz", **settings)
        found = run.edit(str(images), "sdedit", **settings)
        with np.load(folder / "command.npz") as told, np.load(path) as written:
            for name in ("given", "images"):
                np.testing.assert_array_equal(written[name], told[name])
                np.testing.assert_array_equal(found[name], told[name])

    def test_evaluates_like_the_command(self, run, workdir, folder):
        flags = [f"--workdir={workdir}", "--num_steps=4", "--num_examples=20", "--metrics=bpd"]
        command.succeeds("--mode=eval", *flags, f"--out={folder / 'result.json'}")
        report = run.evaluate(["bpd"], num_examples=20)
        told = json.loads((folder / "result.json").read_text())
        found = json.loads(json.dumps(report.record))
        assert found["measured"] == told["measured"]
        assert found["subject"] == told["subject"]
        assert report.path.parent == workdir / "evaluation"
        named = run.evaluate("bpd", num_examples=20, out=folder / "same.json")
        assert api.compare(folder / "result.json", named.path).splitlines()[1].startswith("bpd")

    def test_stores_what_the_optimal_variance_needs(self, run, workdir):
        path = run.variance(20)
        assert path == workdir / "checkpoints" / "4" / "x0_error_ema.json"
        optimal = jax_ddpm.load(workdir, variance="optimal")
        assert optimal.variance(20) == path, "also while sampled so"
        assert np.any(optimal.sample(4) != jax_ddpm.load(workdir).sample(4))

    def test_denoiser_and_grid_are_what_the_sampler_is_given(self, run, workdir):
        plain, guided = (jax_ddpm.load(workdir, clip=False, guidance_scale=s) for s in (1.0, 3.0))
        x, given = jnp.ones((2, 8, 8, 1)), {"label": jnp.array([1, 2])}
        t = jnp.asarray(plain.grid().now.time[4], jnp.float32)
        assert run.grid().num_steps == 4
        call = jax.jit(lambda denoiser: denoiser(x, t, given))
        predictions = [call(model.denoiser()) for model in (plain, guided)]
        assert predictions[0].x0.shape == x.shape
        assert np.all(predictions[0].x0 != predictions[1].x0)

    def test_is_a_trained_model(self, run, workdir):
        assert isinstance(run, Run)
        assert (run.workdir, run.step, run.item) == (workdir, 4, "ema")
        assert run.record["num_steps"] == 4

    def test_numbers_of_numpy_and_lists_will_do(self, workdir):
        run = jax_ddpm.load(str(workdir), np.int64(4), num_steps=np.int64(3), guidance_scale=1)
        assert run.grid().num_steps == 3
        assert len(run.sample(np.int32(2), seed=np.uint32(7), label=np.int64(1))) == 2
        times = jax_ddpm.load(workdir, sampler="ddim", times=[7.0, 3.0])
        assert times.config.sampling.times == (7.0, 3.0)


# A mistake: how Python makes it, the flags that make it, and what both sentences have in common
# with "{}" where an argument is named: (in Python, on the command line).
SAMPLE = ["--mode=sample"]
EVAL = ["--mode=eval"]
EDIT = ["--mode=edit", "--images={images}"]
BAD = {
    "no_samples": (lambda r, **_: r.sample(0), [*SAMPLE, "--num_samples=0"]),
    "negative_samples": (lambda r, **_: r.write_samples(num_samples=-1), ["--num_samples=-1"]),
    "negative_seed": (lambda r, **_: r.sample(seed=-1), ["--seed=-1"]),
    "large_seed": (lambda r, **_: r.sample(seed=2**32), ["--seed=4294967296"]),
    "word_for_a_seed": (lambda r, **_: r.sample(seed="one"), ["--seed=one"]),
    "fraction_of_a_sample": (lambda r, **_: r.sample(2.5), ["--num_samples=2.5"]),
    "no_batch": (lambda r, **_: r.sample(batch_size=0), ["--sample_batch=0"]),
    "negative_batch": (lambda r, **_: r.sample(batch_size=-3), ["--sample_batch=-3"]),
    "unknown_class": (lambda r, **_: r.sample(label=10), ["--class=10"]),
    "fraction_of_a_class": (lambda r, **_: r.sample(label=1.5), ["--class=1.5"]),
    "no_moments": (lambda r, **_: r.write_samples(moments=0), ["--progressive=0"]),
    "too_many_moments": (
        lambda r, **_: r.write_samples(moments=9),
        [*SAMPLE, "--progressive=9", "--num_steps=4"],
    ),
    "out": (lambda r, **_: r.write_samples("x.jpg"), ["--out=x.jpg"]),
    # loading
    "no_run": (lambda load, **_: load("nothing"), ["--workdir=nothing"]),
    "no_such_step": (lambda load, w, **_: load(w, step=3), ["--checkpoint_step=3"]),
    "word_for_a_step": (lambda load, w, **_: load(w, "last"), ["--checkpoint_step=last"]),
    "unknown_option": (lambda load, w, **_: load(w, etaa=1), ["--sampling.etaa=1"]),
    "word_for_an_option": (lambda load, w, **_: load(w, eta="half"), ["--sampling.eta=half"]),
    "number_for_a_name": (lambda load, w, **_: load(w, clip="x"), ["--sampling.clip=x"]),
    "option_of_another": (lambda load, w, **_: load(w, eta=0.5), ["--sampling.eta=0.5"]),
    "unknown_sampler": (lambda load, w, **_: load(w, sampler="dpm"), ["--sampler=dpm"]),
    "too_many_steps": (lambda load, w, **_: load(w, num_steps=9), ["--num_steps=9"]),
    "fraction_of_steps": (lambda load, w, **_: load(w, num_steps=2.5), ["--num_steps=2.5"]),
    "word_for_a_scale": (
        lambda load, w, **_: load(w, guidance_scale="big"),
        ["--guidance_scale=big"],
    ),
    "no_statistic": (lambda load, w, **_: load(w, 2, variance="optimal"), None),
    # editing
    "unknown_edit": (lambda r, i, **_: r.edit(i, "impaint"), [*EDIT, "--edit=impaint"]),
    "no_mask": (lambda r, i, **_: r.edit(i), EDIT),
    "no_such_mask": (lambda r, i, **_: r.edit(i, mask="no.png"), [*EDIT, "--mask=no.png"]),
    "strength": (
        lambda r, i, **_: r.edit(i, "sdedit", strength=2.0, label=1),
        [*EDIT, "--edit=sdedit", "--strength=2.0", "--class=1"],
    ),
    "word_for_a_factor": (
        lambda r, i, **_: r.edit(i, "superres", factor="two", label=1),
        [*EDIT, "--edit=superres", "--factor=two", "--class=1"],
    ),
    "no_resamplings": (
        lambda r, i, **_: r.edit(i, "inpaint", resamplings=0, label=1),
        [*EDIT, "--resamplings=0", "--class=1"],
    ),
    "no_variants": (
        lambda r, i, **_: r.edit(i, "sdedit", num_samples=0, label=1),
        [*EDIT, "--edit=sdedit", "--num_samples=0", "--class=1"],
    ),
    # measuring
    "unknown_metric": (lambda r, **_: r.evaluate("fdi"), [*EVAL, "--metrics=fdi"]),
    "no_metrics": (lambda r, **_: r.evaluate([]), EVAL),
    "no_number": (lambda r, **_: r.evaluate(["fid"]), [*EVAL, "--metrics=fid"]),
    "no_images": (
        lambda r, **_: r.evaluate(["fid"], num_samples=0),
        [*EVAL, "--metrics=fid", "--num_samples=0"],
    ),
    "no_extractor": (
        lambda r, **_: r.evaluate(["fid"], num_samples=9),
        [*EVAL, "--metrics=fid", "--num_samples=9"],
    ),
    "seeds_past_the_last": (
        lambda r, **_: r.evaluate(["fid"], seed=2**32 - 1, num_seeds=2),
        [*EVAL, "--metrics=fid", "--seed=4294967295", "--num_seeds=2"],
    ),
    "no_seeds": (lambda r, **_: r.evaluate("fid", num_seeds=0), [*EVAL, "--num_seeds=0"]),
    "unknown_split": (
        lambda r, **_: r.evaluate("bpd", split="tets"),
        [*EVAL, "--metrics=bpd", "--split=tets"],
    ),
    "no_examples": (
        lambda r, **_: r.evaluate("bpd", num_examples=0),
        [*EVAL, "--metrics=bpd", "--num_examples=0"],
    ),
    "calibration_of_nothing": (
        lambda i, **_: api.evaluate("is", samples=i, calibrate=True),
        [*EVAL, "--workdir=", "--metrics=is", "--samples={images}", "--calibrate"],
    ),
    "no_statistics": (lambda **_: api.fid_stats("a.npz"), ["--mode=fid_stats", "--out=a.npz"]),
    "moments_into_text": (
        lambda **_: api.fid_stats("a.txt"),
        ["--mode=fid_stats", "--out=a.txt"],
    ),
    # training
    "misspelt_config": (lambda train, **_: train("digit"), ["--mode=train", "--config=digit"]),
    "bad_field": (
        lambda train, **_: train(config(seed=-1), "x"),
        ["--mode=train", "--config=digits_conditional", "--config.seed=-1"],
    ),
    "another_run": (
        lambda train, w, **_: train("digits_edm", w),
        ["--mode=train", "--config=digits_edm", "--workdir={w}"],
    ),
    "no_name": (lambda train, **_: train(config()), None),
    "word_for_true": (lambda train, **_: train("digits", profile="yes"), None),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_the_same_sentence_as_on_the_command_line(run, workdir, images, name):
    """Python's names of arguments take the place of flags, and nothing is written."""
    make, flags = BAD[name]
    places = {"r": run, "w": workdir, "i": images, "load": jax_ddpm.load, "train": jax_ddpm.train}
    wanted = inspect.signature(make).parameters
    with pytest.raises(UserError) as caught:
        make(**{key: value for key, value in places.items() if key in wanted})
    line = str(caught.value)
    assert "\n" not in line
    assert "--" not in line.partition("--mode")[0]
    if flags is None:
        return
    flags = [flag.format(images=images, w=workdir) for flag in flags]
    if not any(flag.startswith("--mode") for flag in flags):
        flags = [*SAMPLE, *flags]
    of_a_run = flags[0] in ("--mode=sample", "--mode=edit", "--mode=eval")
    if of_a_run and not any(flag.startswith("--workdir") for flag in flags):
        flags.append(f"--workdir={workdir}")
    told = command.mistake(*(flag for flag in flags if flag != "--workdir="))
    assert line == in_python(told)
    assert line == in_python(caught.value.flags)


@pytest.mark.parametrize("flag", [f for f, o in ARGUMENTS.items() if kind_of(o) is int])
def test_an_endless_number_is_refused(flag):
    """Seeds and steps are no amounts; the others are never more than the run or the data has."""
    bounded = {"seed", "checkpoint_step", "progressive", "num_examples", "factor"}
    if flag not in bounded:
        with pytest.raises(UserError, match=f"--{flag}=1000000000: it must be in"):
            arguments.require({python_name(flag): 10**9})


@pytest.mark.parametrize(
    "call", [jax_ddpm.load, lambda path: jax_ddpm.train(config(), path), read_config]
)
def test_a_path_that_would_be_cut_off_is_refused(call):
    with pytest.raises(UserError, match=r"(workdir|config)=a\x00b: ") as caught:
        call("a\0b")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["train", "check", "load", "sample"])
def test_settings_of_jax_that_results_depend_on_are_refused(run, workdir, tmp_path, name):
    calls = {
        "train": lambda: jax_ddpm.train(config(), tmp_path / "run"),
        "check": lambda: api.check(config(), tmp_path / "run"),
        "load": lambda: jax_ddpm.load(workdir),
        "sample": lambda: run.sample(1),
    }
    with jax.default_prng_impl("rbg"), pytest.raises(UserError, match="JAX_DEFAULT_PRNG_IMPL=rbg"):
        calls[name]()
    assert not (tmp_path / "run").exists()


def test_the_precision_of_products_is_in_the_record(run):
    assert run.record["matmul_precision"] is None
    with jax.default_matmul_precision("highest"):
        assert run.record["matmul_precision"] == "highest"


class TestInPython:
    @pytest.mark.parametrize(
        ("told", "expected"),
        [
            ("--class=10: classes 0 to 9", "label=10: classes 0 to 9"),
            ("--sampling.eta=half: it must be", "eta=half: it must be"),
            ("--sampling: unknown field 'x'", "sampling: unknown field 'x'"),
            ("give --sample_batch or --seed", "give batch_size or seed"),
            ("--calibrate measures", "calibrate=True measures"),
            ("--config.data.path is", "config.data.path is"),
            ("lies in /a--b/c-d: --out=/x--seed", "lies in /a--b/c-d: out=/x--seed"),
            (
                "--out=a: make it by --mode=variance --workdir=runs/x --class=1; or --class=2",
                "out=a: make it by --mode=variance --workdir=runs/x --class=1; or label=2",
            ),
        ],
    )
    def test_flags_are_arguments_and_commands_stay(self, told, expected):
        assert in_python(told) == expected
        assert in_python(expected) == expected

    def test_defaults_are_those_that_help_tells(self):
        """Defaults that depend on the mode are left out."""
        functions = (api.train, api.load, Run.sample, Run.write_samples, Run.write_edits)
        functions += (api.evaluate, Request)
        found = {}
        for function in functions:
            for name, parameter in inspect.signature(function).parameters.items():
                if parameter.default is not inspect.Parameter.empty:
                    found.setdefault(name, set()).add(parameter.default)
        for flag, argument in ARGUMENTS.items():
            name = python_name(flag)
            if name in found and name not in ("num_samples", "split"):
                assert found[name] == {argument.default}, flag

    def test_nothing_but_none_stands_for_left_out(self):
        arguments.require({"label": None, "batch_size": None, "step": None})
        with pytest.raises(UserError, match="--seed=None: it must be a whole number"):
            arguments.require({"seed": None})
        with pytest.raises(UserError, match="--class=True: it must be a name or a number"):
            arguments.require({"label": True})


def test_the_package_has_two_doors():
    assert jax_ddpm.train is api.train
    assert jax_ddpm.load is api.load
    assert jax_ddpm.__version__
    with pytest.raises(AttributeError, match="no attribute 'sample'"):
        _ = jax_ddpm.sample


def test_what_is_no_config_is_refused():
    with pytest.raises(UserError, match="--config=3: it must be a config, its name or its path"):
        inspect.unwrap(read_config)(3)
    with pytest.raises(UserError, match=r"config: .*no_such_field"):
        read_config(ConfigDict({"no_such_field": 1}))
