"""Metrics from the device to the log: exact means, and files that can be read back."""

import json
import random
import struct

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jax_ddpm.errors import UserError
from jax_ddpm.training import meter as metrics
from jax_ddpm.training.meter import Meter, MetricWriter, NonFinite, Progress


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when it is told to."""

    class Clock:
        now = 100.0

        def __call__(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(metrics.time, "perf_counter", clock)
    return clock


def of_step(loss=(1.0, 1), gradient_norm=1.0, finite=1.0, **more):
    pairs = {"loss": loss, "gradient_norm": (gradient_norm, 1), "finite": (finite, 1)} | more
    return {name: tuple(jnp.array(x, "f") for x in pair) for name, pair in pairs.items()}


class Lines:
    """The lines that a meter writes, and the meter."""

    def __init__(self, every, lag=0, batch_size=8):
        self.lines = []
        self.meter = Meter(batch_size, every, lambda *line: self.lines.append(line), lag)

    def add(self, steps, first=0):
        for step, of_this_step in enumerate(steps, first):
            self.meter.add(step, of_this_step)

    def without_rate(self):
        return [
            (step, {name: mean for name, mean in means.items() if name != "images_per_second"})
            for step, means in self.lines
        ]


def random_steps(count, seed):
    """Losses of unlike magnitude and weight; "rare" often has no example."""
    rng = np.random.default_rng(seed)
    return [
        of_step(
            loss=(np.exp(rng.normal(0, 5)), rng.integers(1, 9)),
            gradient_norm=np.exp(rng.normal(0, 5)),
            rare=(rng.normal(), 1.0) if rng.random() < 0.2 else (0.0, 0.0),
        )
        for _ in range(count)
    ]


def disturb(meter, chance):
    """Does now and then what saving and evaluating do."""
    if chance.random() < 0.2:
        with meter.paused():
            if chance.random() < 0.5:
                meter.state()
    if chance.random() < 0.1:
        meter.state()


class TestMeter:
    def test_means_weigh_examples_not_steps(self):
        log = Lines(every=2)
        log.add(
            [
                of_step(loss=(6, 2), rare=(0, 0), never=(0, 0)),
                of_step(loss=(10, 6), rare=(5, 1), never=(0, 0)),
            ]
        )
        ((step, means),) = log.without_rate()
        assert step == 2
        assert means == {"loss": 2.0, "rare": 5.0, "gradient_norm": 1.0}

    @pytest.mark.parametrize("seed", range(20))
    def test_a_line_covers_the_steps_since_the_line_before(self, seed):
        """Whatever the lag, and whenever the loop pauses to save or evaluate."""
        chance = random.Random(seed)
        every, lag, count = chance.randint(1, 7), chance.randint(0, 5), chance.randint(1, 30)
        log, losses = Lines(every, lag), [chance.randint(0, 2**20) for _ in range(count)]
        for step, loss in enumerate(losses):
            log.meter.add(step, of_step(loss=(loss, 1)))
            disturb(log.meter, chance)
        log.meter.finish()
        ends = [*range(every, count + 1, every)] + ([count] if count % every else [])
        starts = [0, *ends[:-1]]
        assert [(step, means["loss"]) for step, means in log.lines] == [
            (end, sum(losses[start:end]) / (end - start))
            for start, end in zip(starts, ends, strict=True)
        ]

    @pytest.mark.parametrize("lag", [0, 2, 4])
    def test_a_line_waits_for_the_steps_behind_it(self, lag):
        log, written = Lines(every=3, lag=lag), []
        for step, of_this_step in enumerate(random_steps(8, seed=0)):
            log.meter.add(step, of_this_step)
            written.append(len(log.lines))
        assert written == [max(0, step + 1 - lag) // 3 for step in range(8)]

    def test_reads_only_steps_that_have_others_behind_them(self, monkeypatch):
        """Reading the newest would make the device wait for the host."""
        read = []
        monkeypatch.setattr(metrics.jax, "device_get", lambda tree: read.append(tree) or tree)
        steps = [of_step() for _ in range(4)]
        Lines(every=1, lag=2).add(steps)
        assert [id(tree) for tree in read] == [id(tree) for tree in steps[:2]]

    @pytest.mark.parametrize("every", [1, 3, 7, 100])
    def test_a_run_that_was_interrupted_writes_the_same_lines(self, every):
        """Bit by bit, after any step, through JSON."""
        steps = random_steps(10, seed=every)
        whole = Lines(every, lag=2)
        whole.add(steps)
        whole.meter.finish()
        for done in range(11):
            first, second = Lines(every, lag=2), Lines(every, lag=2)
            first.add(steps[:done])
            state = json.loads(json.dumps(first.meter.state()))
            assert [step for step, _ in first.lines] == [*range(every, done + 1, every)]
            second.meter.restore(done, state)
            second.add(steps[done:], first=done)
            second.meter.finish()
            assert first.without_rate() + second.without_rate() == whole.without_rate()

    @pytest.mark.parametrize("lag", [0, 2, 10])
    def test_the_remainder_is_written_once(self, lag):
        log = Lines(every=4, lag=lag)
        log.add(random_steps(6, seed=0))
        for _ in range(2):
            log.meter.finish()
            assert [step for step, _ in log.lines] == [4, 6]

    def test_without_a_remainder_nothing_is_written(self):
        log = Lines(every=3)
        log.meter.finish()
        log.add(random_steps(3, seed=0))
        log.meter.finish()
        assert [step for step, _ in log.lines] == [3]

    def test_state_waits_for_all_steps_and_keeps_them(self):
        log = Lines(every=3, lag=10)
        log.add([of_step(loss=(i, 2)) for i in range(5)])
        for _ in range(2):
            assert log.meter.state()["loss"] == [3 + 4, 4]
        assert [(step, means["loss"]) for step, means in log.lines] == [(3, 0.5)]

    def test_rate_leaves_pauses_out(self, clock):
        log = Lines(every=5)
        log.add([of_step()] * 4)
        clock.now += 4
        with log.meter.paused():
            clock.now += 1000
        clock.now += 1
        log.meter.add(4, of_step())
        assert log.lines[0][1]["images_per_second"] == 5 * 8 / 5

    def test_rate_is_that_of_the_steps_of_this_process(self, clock):
        """Steps of the line that were done before an interruption do not count."""
        log = Lines(every=5)
        log.meter.restore(3, {"loss": [3.0, 24.0]})
        clock.now += 4
        log.add([of_step()] * 2, first=3)
        clock.now += 1
        log.add([of_step()] * 5, first=5)
        assert [means["images_per_second"] for _, means in log.lines] == [2 * 8 / 4, 5 * 8 / 1]

    @pytest.mark.parametrize(
        ("bad", "named"),
        [
            ({"loss": (np.nan, 8)}, ["loss"]),
            ({"gradient_norm": np.inf}, ["gradient_norm"]),
            ({"loss": (np.inf, 8), "gradient_norm": np.nan}, ["loss", "gradient_norm"]),
        ],
    )
    @pytest.mark.parametrize(
        "go_on",
        [
            lambda meter: meter.add(3, of_step()),
            lambda meter: meter.state(),
            lambda meter: meter.paused().__enter__(),
            lambda meter: meter.finish(),
        ],
        ids=["add", "state", "paused", "finish"],
    )
    def test_names_the_first_step_that_is_not_finite(self, bad, named, go_on):
        """It does so before anything of that step is saved or written."""
        log = Lines(every=1, lag=2)
        log.add([of_step(), of_step(**bad, finite=0.0), of_step(loss=(np.nan, 8), finite=0.0)])
        with pytest.raises(NonFinite, match=f"^step 1: {' and '.join(named)} not fin") as caught:
            go_on(log.meter)
        assert isinstance(caught.value, UserError)
        assert "\n" not in str(caught.value)
        assert (caught.value.step, caught.value.quantities) == (1, named)
        assert [step for step, _ in log.lines] == [1]


def tensorboard_events(path):
    """The events of a file, read from the record format by hand."""
    from tensorboardX.proto.event_pb2 import Event

    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[12 + length + 4 :]
    return events


def tensorboard_scalars(folder):
    """{(name, step): value}"""
    return {
        (value.tag, event.step): value.simple_value
        for path in folder.iterdir()
        for event in tensorboard_events(path)
        for value in event.summary.value
    }


class TestMetricWriter:
    written = ((10, {"loss": 0.5, "images_per_second": 1e3}), (20, {"heldout_loss": 0.25}))

    @pytest.fixture(autouse=True)
    def each_writer_in_another_second(self, monkeypatch):
        """Event files are named by the second; a run takes longer than that to start again."""
        seconds = iter(range(1_600_000_000, 1_700_000_000))
        monkeypatch.setattr(metrics.time, "time", lambda: float(next(seconds)))

    def write(self, workdir, step=0, position=0, lines=written):
        with MetricWriter(workdir, step, position) as writer:
            for at, scalars in lines:
                writer.write(at, scalars)
            return writer.position

    def lines(self, workdir):
        return [*map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())]

    def test_files_hold_what_was_written(self, tmp_path):
        self.write(tmp_path)
        assert self.lines(tmp_path) == [{"step": s} | v for s, v in self.written]
        expected = {(name, s): value for s, v in self.written for name, value in v.items()}
        assert tensorboard_scalars(tmp_path / "tensorboard") == expected

    def test_a_line_is_there_as_soon_as_it_is_written(self, tmp_path):
        with MetricWriter(tmp_path) as writer:
            assert writer.position == 0
            for step in (1, 2):
                writer.write(step, {"loss": 0.5})
                assert self.lines(tmp_path)[-1] == {"step": step, "loss": 0.5}
                assert ("loss", step) in tensorboard_scalars(tmp_path / "tensorboard")
                assert writer.position == (tmp_path / "metrics.jsonl").stat().st_size

    def test_starts_anew(self, tmp_path):
        """No points of an abandoned run stay behind."""
        self.write(tmp_path)
        with pytest.warns(UserWarning, match=r"metrics.jsonl: begun anew, as no checkpoint"):
            self.write(tmp_path, lines=[(5, {"loss": 0.125})])
        assert self.lines(tmp_path) == [{"step": 5, "loss": 0.125}]
        assert tensorboard_scalars(tmp_path / "tensorboard") == {("loss", 5): 0.125}

    @pytest.mark.parametrize("rest", [b"", b'{"step": 20, "l', b'{"step": 20, "loss": 0.5}\n{"st'])
    def test_resuming_drops_what_came_after_the_checkpoint(self, tmp_path, rest):
        """Whole lines and half a line; what came before stays byte by byte."""
        position = self.write(tmp_path, lines=[(5, {"loss": 0.1 + 0.2}), (10, {"loss": 1 / 3})])
        path = tmp_path / "metrics.jsonl"
        before = path.read_bytes()
        assert position == len(before)
        path.write_bytes(before + rest)
        after = self.write(tmp_path, 10, position, [(20, {"loss": 0.25})])
        assert path.read_bytes() == before + b'{"step": 20, "loss": 0.25}\n'
        assert after == path.stat().st_size

    @pytest.mark.parametrize("left", [None, b'{"step": 5}\n'])
    def test_resuming_without_all_of_the_file_goes_on_with_what_is_there(self, tmp_path, left):
        if left is not None:
            (tmp_path / "metrics.jsonl").write_bytes(left)
        lost = 1000 - len(left or b"")
        with pytest.warns(UserWarning, match=rf"metrics.jsonl: {lost} bytes of the log are lost"):
            self.write(tmp_path, 10, 1000, [(20, {"loss": 0.25})])
        assert [line["step"] for line in self.lines(tmp_path)] == ([5, 20] if left else [20])

    def test_tensorboard_is_told_where_a_run_goes_on(self, tmp_path):
        """Earlier files are kept; of their points TensorBoard drops those from there on."""
        from tensorboardX.proto.event_pb2 import SessionLog

        board = tmp_path / "tensorboard"
        self.write(tmp_path)
        (first,) = board.iterdir()
        before = first.read_bytes()
        self.write(tmp_path, 10, 0, [(20, {"heldout_loss": 0.125})])
        assert first.read_bytes() == before
        (second,) = set(board.iterdir()) - {first}
        assert second.name > first.name, "TensorBoard reads them in this order"
        version, start, point = tensorboard_events(second)
        assert version.file_version == "brain.Event:2"
        assert (start.session_log.status, start.step) == (SessionLog.START, 11)
        assert (point.summary.value[0].tag, point.step) == ("heldout_loss", 20)

    def test_a_full_disk_is_an_error_at_once(self, tmp_path):
        """Leaving does not raise another; half a line is dropped on resuming."""
        whole = self.write(tmp_path, lines=[(step, {"loss": 0.5}) for step in range(20)])
        writer = MetricWriter(tmp_path, 19, whole)
        size = whole + 10
        with tiny.no_file_grows_past(size), writer, pytest.raises(OSError, match="too large"):
            writer.write(20, {"loss": 0.25})
        assert (tmp_path / "metrics.jsonl").stat().st_size <= size
        self.write(tmp_path, 19, whole, [(20, {"loss": 0.25})])
        assert [line["step"] for line in self.lines(tmp_path)] == [*range(21)]

    def test_a_full_disk_is_an_error_of_tensorboard_files_too(self, tmp_path):
        with MetricWriter(tmp_path) as writer:
            (board,) = (tmp_path / "tensorboard").iterdir()
            writer.write(5, {"loss": 0.5})
            with (
                tiny.no_file_grows_past(board.stat().st_size + 10),
                pytest.raises(OSError, match="too large"),
            ):
                writer.write(10, {"x": 1.0})


class TestProgressOffATerminal:
    def test_prints_plain_lines(self, capsys, clock):
        with Progress(num_steps=4000) as progress:
            progress.say("a word")
            progress.advance(1)
            clock.now += 90
            progress.show(1000, {"loss": 0.12345, "images_per_second": 2048.4})
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.splitlines() == [
            "a word",
            "step 1,000/4,000  loss 0.1235  2,048 images/s  1:30 elapsed, 4:30 left",
        ]

    @pytest.mark.parametrize(
        ("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (3600, "1:00:00"), (36_061, "10:01:01")]
    )
    def test_clock(self, capsys, clock, seconds, shown):
        with Progress(num_steps=10) as progress:
            clock.now += seconds
            progress.show(10, {"loss": 0.0, "images_per_second": 1.0})
        assert f"{shown} elapsed, 0:00 left" in capsys.readouterr().err

    def test_time_left_is_told_from_the_steps_of_this_run(self, capsys, clock):
        with Progress(num_steps=4000, done=2000) as progress:
            clock.now += 60
            progress.show(3000, {"loss": 0.0, "images_per_second": 1.0})
        assert "1:00 elapsed, 1:00 left" in capsys.readouterr().err

    def test_a_line_may_come_before_any_step_of_this_run(self, capsys, clock):
        """A run that stopped right before its end had not yet written it."""
        with Progress(num_steps=10, done=10) as progress:
            progress.show(10, {"loss": 0.5, "images_per_second": 0.0})
        assert "step 10/10  loss 0.5000" in capsys.readouterr().err
