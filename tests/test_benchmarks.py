"""Every benchmark runs, at a tiny size, and prints what it promises. Nothing here is timed."""

import importlib
import json
import pathlib

import pytest
import tiny

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
TINY = (
    *("--shape=digits", "--rounds=1", "--batch_size=4", "--override"),
    *("model.base_channels=8", "model.num_groups=4", "process.num_timesteps=8"),
    *("model.channel_multipliers=(1,)", "model.attention_resolutions=(8,)"),
    *("data.flip=True", "model.dropout=0.1"),
)
COMMON = {"benchmark", "command", "date", "machine", "load_before", "device", "versions"}
SETTING = {"shape", "batch_size", "dtype", "devices"}
RATE = {"images_per_second", "tflops", "peak_tflops", "peak_share"}
SPEEDUP = {"their_seconds", "speedup", "speedup_range"}

quick_compilation = pytest.fixture(tiny.quick_compilation, autouse=True, scope="module")


@pytest.fixture(autouse=True)
def tiny_measurements(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # in processes of their own
    measuring = importlib.import_module("measuring")
    monkeypatch.setattr(measuring, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(measuring, "_MATRIX_SIZE", {"cpu": 64})


@pytest.fixture
def results(monkeypatch, capsys):
    """The rows that a benchmark prints, each under the common record."""

    def run(name, *flags):
        module = importlib.import_module(name)
        monkeypatch.setattr("sys.argv", [f"benchmarks/{name}.py", *flags])
        module.main()
        printed = json.loads(capsys.readouterr().out)
        assert printed.keys() >= COMMON
        return printed["results"]

    return run


def make_setting(*flags):
    setting = importlib.import_module("setting")
    return setting.Setting(setting.make_parser("").parse_args(flags), batch_size=4)


def make_programs(log, **functions):
    measuring = importlib.import_module("measuring")

    def program(name, function):
        def launch():
            log.append(name)
            return function()

        return measuring.Program(launch, lambda result: None)

    return {name: program(name, function) for name, function in functions.items()}


class TestEachPrintsWhatItPromises:
    def test_forward(self, results):
        (row,) = results("forward", *TINY)
        assert row.keys() >= SETTING | RATE | {"seconds", "gflop_per_image"}

    @pytest.mark.slow
    def test_train_step(self, results):
        (row,) = results("train_step", *TINY, "training.steps_per_dispatch=2")
        assert row.keys() >= SETTING | RATE | {"seconds", "gflop_per_image"}
        assert row["steps"] == 2
        assert row["steps_per_second"] == pytest.approx(2 / row["seconds"])

    @pytest.mark.slow
    def test_sampling(self, results):
        (row,) = results("sampling", *TINY, "--sampler=dpmpp_2m")
        assert row.keys() >= SETTING | RATE | {"seconds", "sampler"}
        assert (row["steps"], row["timed_steps"], row["evaluations"]) == (15, 15, 15)
        assert "projected_seconds" not in row

    @pytest.mark.slow
    def test_sampling_of_fewer_steps_says_so(self, results):
        (row,) = results("sampling", *TINY, "--timed_steps=4")
        assert (row["steps"], row["timed_steps"], row["evaluations"]) == (1000, 4, 4)
        assert row["projected_seconds"] == pytest.approx(row["seconds"] * 250)

    @pytest.mark.slow
    def test_startup(self, results):
        rows = results("startup", *TINY)
        assert [row["case"] for row in rows] == ["cold", "warm"]
        parts = {f"{part}_seconds" for part in ("initialise", "trace", "compile", "first_step")}
        assert all(row.keys() >= SETTING | parts | {"seconds"} for row in rows)

    @pytest.mark.slow
    def test_memory(self, results, monkeypatch):
        monkeypatch.setattr("memory.REMAT_POLICIES", {})
        (row,) = results("memory", *TINY)
        assert row.keys() >= SETTING | {"remat", "planned_gigabytes"}
        assert row["peak_gigabytes"] > 0

    @pytest.mark.slow
    def test_checkpoint(self, results, tmp_path):
        (row,) = results("checkpoint", *TINY, f"--folder={tmp_path}")
        seconds = {f"{part}_seconds" for part in ("step", "written", "blocked", "stall")}
        assert row.keys() >= SETTING | seconds | {"stall_steps", "gigabytes"}

    @pytest.mark.slow
    def test_input_pipeline(self, results):
        rows = results("input_pipeline", *TINY, "data.source=folder")
        assert [row["feed"] for row in rows] == ["resident", "streamed", "decoded"]
        assert all(row["times_the_step"] > 0 for row in rows)


class TestMeasuring:
    def test_programs_take_turns(self):
        log = []
        programs = make_programs(log, ours=lambda: 1, theirs=lambda: 2)
        importlib.import_module("measuring").alternate(programs, rounds=3)
        assert log[4:] == ["ours", "theirs"] * 3

    def test_speedup_is_the_median_of_the_ratios_in_a_round(self):
        seconds = {"ours": [1.0, 2.0, 4.0], "theirs": [3.0, 4.0, 4.0]}
        row = importlib.import_module("measuring").compared(seconds)
        assert (row["speedup"], row["speedup_range"]) == (2.0, [1.0, 3.0])

    def test_what_others_take_of_the_processors_is_told(self, monkeypatch):
        measuring = importlib.import_module("measuring")
        monkeypatch.setattr("os.cpu_count", lambda: 2)
        times = iter([(100.0, 1.0, 50.0), (110.0, 5.0, 56.0)])  # all, ours, clock
        monkeypatch.setattr(measuring.Others, "_now", lambda self: next(times))
        assert measuring.Others().share() == pytest.approx((10 - 4) / (6 * 2))

    def test_a_busy_machine_is_warned_of(self, monkeypatch, capsys):
        measuring = importlib.import_module("measuring")
        monkeypatch.setattr(measuring._OTHERS, "share", lambda: 0.5)
        measuring.report("A title.", [{"seconds": 1.0}])
        printed = capsys.readouterr()
        assert json.loads(printed.out)["others_share"] == 0.5
        assert "other programs took 50% of the processors" in printed.err


class TestSettings:
    def test_a_gpu_that_is_not_there_is_told_in_a_line(self):
        with pytest.raises(SystemExit, match=r"^error: --platform=gpu: none is at hand.*measured$"):
            make_setting("--platform=gpu")

    def test_a_batch_size_that_does_not_fit_is_a_result(self):
        setting = importlib.import_module("setting")

        def measure(of):
            if of.batch_size > 4:
                raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
            return {"images_per_second": 1.0}

        arguments = setting.make_parser("").parse_args([*TINY, "--batch_size", "4", "8"])
        first, second = setting.measure_each(arguments, measure)
        assert second["out_of_memory"]
        assert first["best"]
        assert "best" not in second

    def test_any_other_failure_passes(self):
        setting = importlib.import_module("setting")

        def measure(of):
            raise RuntimeError("something else")

        with pytest.raises(RuntimeError, match="something else"):
            setting.measure_each(setting.make_parser("").parse_args(TINY), measure)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # PyTorch's and diffusers' own
class TestPeer:
    @pytest.fixture(autouse=True)
    def installed(self):
        pytest.importorskip("torch")
        pytest.importorskip("diffusers")

    @pytest.mark.parametrize(
        ("shape", "widths"),
        [("digits", 8), ("cifar10", 32), ("256", 8)],
    )
    def test_computes_what_ours_does(self, shape, widths):
        setting = make_setting(
            f"--shape={shape}",
            "--override",
            f"model.base_channels={widths}",
            "model.num_groups=4",
        )
        forward = importlib.import_module("forward")
        theirs = importlib.import_module("peer").Peer(setting).forward()
        assert forward.difference(forward.forward(setting), theirs) < 1e-5

    @pytest.mark.parametrize("name", ["forward", "train_step"])
    def test_takes_turns_with_ours(self, results, name):
        (row,) = results(name, *TINY, "--peer")
        assert row.keys() >= SPEEDUP

    @pytest.mark.parametrize("sampler", ["ancestral", "dpmpp_2m"])
    def test_samples_in_turn_with_ours(self, results, sampler):
        (row,) = results("sampling", *TINY, "--peer", f"--sampler={sampler}", "--timed_steps=4")
        assert row.keys() >= SPEEDUP

    def test_its_train_step_learns(self):
        setting = make_setting(*TINY, "training.learning_rate=1e-3")
        program = importlib.import_module("peer").Peer(setting).training(steps=20)
        assert program.launch() > program.launch()


@pytest.mark.slow
class TestFeatures:
    def test_print_what_they_promise(self, results):
        pytest.importorskip("pytorch_fid")
        rows = results("features", "--batch_size=4", "--rounds=1", "--distance_rounds=1")
        assert all(row.keys() >= SPEEDUP | {"relative_difference"} for row in rows)
