"""From the device to the log: exact means, and files that can be read back."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from jax_ddpm.errors import UserError
from jax_ddpm.training import metrics
from jax_ddpm.training.metrics import Meter, MetricWriter, Progress


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


class TestMeter:
    def test_means_weigh_examples_not_steps(self):
        meter = Meter(batch_size=8, lag=0)
        meter.add(0, of_step(loss=(6, 2), rare=(0, 0), never=(0, 0)))
        meter.add(1, of_step(loss=(10, 6), rare=(5, 1), never=(0, 0)))
        means = meter.means()
        assert (means["loss"], means["rare"]) == (2.0, 5.0)
        assert "never" not in means
        assert "finite" not in means

    def test_each_step_is_in_one_mean(self):
        meter = Meter(batch_size=8, lag=2)
        seen = []
        for step in range(10):
            meter.add(step, of_step(loss=(step, 1)))
            if step in (4, 6):
                seen.append(meter.means()["loss"])
        with meter.paused():
            seen.append(meter.means()["loss"])
        assert seen == [np.mean([0, 1, 2]), np.mean([3, 4]), np.mean([5, 6, 7, 8, 9])]

    def test_reads_only_steps_that_have_others_behind_them(self, monkeypatch):
        """Reading the newest would make the device wait for the host."""
        read = []
        monkeypatch.setattr(metrics.jax, "device_get", lambda tree: read.append(tree) or tree)
        meter, steps = Meter(batch_size=8, lag=2), [of_step() for _ in range(4)]
        for step in range(4):
            meter.add(step, steps[step])
        assert [id(tree) for tree in read] == [id(tree) for tree in steps[:2]]

    def test_rate_leaves_pauses_out(self, clock):
        meter = Meter(batch_size=8, lag=0)
        for step in range(5):
            meter.add(step, of_step())
        clock.now += 4
        with meter.paused():
            clock.now += 1000
        clock.now += 1
        assert meter.means()["images_per_second"] == 5 * 8 / 5

    @pytest.mark.parametrize(
        ("bad", "named"),
        [
            ({"loss": (np.nan, 8)}, "loss"),
            ({"gradient_norm": np.inf}, "gradient_norm"),
            ({"loss": (np.inf, 8), "gradient_norm": np.nan}, "loss and gradient_norm"),
        ],
    )
    def test_names_the_first_step_that_is_not_finite(self, bad, named):
        meter = Meter(batch_size=8, lag=1)
        meter.add(0, of_step())
        meter.add(1, of_step(**bad, finite=0.0))
        with pytest.raises(UserError, match=f"^step 1: {named} not finite") as caught:
            meter.add(2, of_step(loss=(np.nan, 8), finite=0.0))
        assert "\n" not in str(caught.value)


def tensorboard_scalars(folder):
    """{(name, step): value}, read from the record format by hand."""
    from tensorboardX.proto.event_pb2 import Event

    scalars = {}
    for path in folder.iterdir():
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[12 + length + 4 :]
            scalars |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
    return scalars


class TestMetricWriter:
    written = ((10, {"loss": 0.5, "images_per_second": 1e3}), (20, {"heldout_loss": 0.25}))

    def write(self, workdir):
        with MetricWriter(workdir) as writer:
            for step, scalars in self.written:
                writer.write(step, scalars)

    def test_files_hold_what_was_written(self, tmp_path):
        self.write(tmp_path)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [{"step": s} | v for s, v in self.written]
        expected = {(name, s): value for s, v in self.written for name, value in v.items()}
        assert tensorboard_scalars(tmp_path / "tensorboard") == expected

    def test_a_line_is_there_as_soon_as_it_is_written(self, tmp_path):
        with MetricWriter(tmp_path) as writer:
            writer.write(1, {"loss": 0.5})
            assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 0.5

    def test_starts_anew(self, tmp_path):
        """No points of an abandoned run stay behind."""
        self.write(tmp_path)
        (of_this_second,) = (tmp_path / "tensorboard").iterdir()
        of_this_second.rename(of_this_second.with_name("events.out.tfevents.1.host"))
        with MetricWriter(tmp_path) as writer:
            writer.write(5, {"loss": 0.125})
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
        assert tensorboard_scalars(tmp_path / "tensorboard") == {("loss", 5): 0.125}


class TestProgressOffATerminal:
    def test_prints_plain_lines(self, capsys, clock):
        with Progress(num_steps=4000) as progress:
            progress.say("a word")
            progress.advance()
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
