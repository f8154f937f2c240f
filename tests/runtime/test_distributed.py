"""Several processes decide as one, stop at the same moment, and never wait for a dead one."""

import functools
import os
import random
import signal
import time

import jax
import numpy as np
import pytest
from jobs import joined, tells_of_another

from jax_ddpm.errors import UserError
from jax_ddpm.runs.workdir import claimed
from jax_ddpm.runtime.devices import make_mesh, place, split
from jax_ddpm.runtime.distributed import (
    from_first,
    is_first,
    lost,
    noticing_loss,
    own_folder,
    require_agreement,
    several,
    shared_poll,
)
from jax_ddpm.runtime.stopping import EXIT_CODE, Stopped


def succeeds(job):
    """The output of each process of a job."""
    results = job.results()
    assert [result.returncode for result in results] == [0] * len(results), results
    return [result.stdout for result in results]


class TestOneProcess:
    def test_decides_and_writes_itself(self, tmp_path):
        assert is_first()
        assert not several()
        value = object()
        assert from_first(lambda: value) is value
        with own_folder(tmp_path) as folder:
            assert folder is tmp_path

    def test_polls_as_it_is(self):
        def poll():
            pass

        assert shared_poll(poll) is poll

    def test_has_nobody_to_lose(self):
        assert not lost(jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed"))


def agree():
    first = jax.process_index() == 0
    assert is_first() == first
    assert several()

    def decide():
        assert first
        time.sleep(0.5)  # the others wait
        return {"steps": [1, 2, None], "text": "é" * 5000, "inner": from_first(lambda: [])}

    assert from_first(decide) == {"steps": [1, 2, None], "text": "é" * 5000, "inner": []}
    for length in (0, 1, 2, 127, 128, 129):
        assert from_first(lambda: "x" * length) == "x" * length  # noqa: B023

    def refuse():
        raise UserError("no such thing: 'é'")

    with pytest.raises(UserError, match=r"^no such thing: 'é'$"):
        from_first(refuse)
    assert from_first(lambda: 1) == 1


@pytest.mark.parametrize(("count", "devices"), [(2, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_what_the_first_process_decides_holds_for_all(tmp_path, count, devices):
    succeeds(joined(tmp_path, count, devices, agree))


def disagree(facts, line):
    """All hear of the one that differs; those who agree hear nothing."""
    for same in ({}, {"é": 1, "inner": {"x": [1, None]}}):
        require_agreement(same)
    with pytest.raises(UserError) as caught:
        require_agreement(facts[jax.process_index()])
    assert str(caught.value) == f"process {line}; start all with the same command"


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ([{"a": {"b": 1}}, {"a": {"b": 2}}], "1 has a.b 2, but process 0 1"),
        pytest.param(
            [{"a": 1, "b": 2}, {"a": 1}, {"a": 1}],
            "0 has b 2, but process 1 None",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_process_that_was_started_otherwise_is_named_by_all(tmp_path, facts, line):
    succeeds(joined(tmp_path, len(facts), 1, functools.partial(disagree, facts, line)))


def write(workdir):
    with own_folder(workdir) as folder:
        (folder / "log").write_text(str(jax.process_index()))
        from_first(lambda: None)
    assert is_first() == folder.exists()
    assert (workdir / "log").read_text() == "0"


@pytest.mark.slow
def test_files_of_the_first_process_alone_are_kept(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    succeeds(joined(tmp_path, 2, 1, functools.partial(write, workdir)))
    assert [path.name for path in workdir.iterdir()] == ["log"]


def claim(workdir):
    with pytest.raises(UserError, match="another process trains there"), claimed(workdir):
        pass


@pytest.mark.slow
def test_a_workdir_that_is_taken_is_refused_to_all(tmp_path):
    with claimed(tmp_path / "run"):
        succeeds(joined(tmp_path, 2, 1, functools.partial(claim, tmp_path / "run")))


def poll_amid_work(signalled):
    """Polls, at its own pace, between programs that exchange data; ``signalled``: process → call"""
    mesh = make_mesh()
    work = jax.jit(lambda x: (x + x.sum() / x.size) / 2, out_shardings=split(mesh))
    x = place(np.arange(16 * mesh.size, dtype=np.float32), split(mesh))
    rng = random.Random(jax.process_index())

    def poll():
        if calls >= signalled.get(jax.process_index(), 10**9):
            raise Stopped("SIGTERM")

    shared = shared_poll(poll)
    try:
        for calls in range(400):  # noqa: B007
            time.sleep(rng.random() / 1000)
            x = work(x)
            shared()
    except Stopped as request:
        print(request, calls)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
def test_a_request_to_one_process_stops_all_at_the_same_call(tmp_path, count, devices):
    work = functools.partial(poll_amid_work, {count - 1: 200, 0: 203})
    outputs = succeeds(joined(tmp_path, count, devices, work))
    (told,) = set(outputs)
    name, call = told.split()
    assert name == "SIGTERM"
    assert 200 <= int(call) <= 210, "soon"


@pytest.mark.slow
def test_without_a_request_all_go_on(tmp_path):
    assert succeeds(joined(tmp_path, 2, 1, functools.partial(poll_amid_work, {}))) == ["", ""]


def test_other_errors_are_not_taken_for_a_lost_process(monkeypatch):
    monkeypatch.setattr("jax_ddpm.runtime.distributed.several", lambda: True)
    for error in (
        ValueError("gloo"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"),
        OSError("UNKNOWN: connection"),
        UserError("no such connection"),
    ):
        assert not lost(error)


def fail(how, victim):
    """All compute together, until one process ends ``how``."""
    mesh = make_mesh()
    work = jax.jit(lambda x: x + x.sum(), out_shardings=split(mesh))
    x = place(np.zeros(mesh.size, np.float32), split(mesh))
    try:
        with noticing_loss():
            for i in range(10**9):
                if i == 20 and jax.process_index() == victim:
                    how()
                x = jax.block_until_ready(work(x))
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def refused():
    raise UserError("my own mistake")


def broken():
    raise ZeroDivisionError


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "count", "code", "message"),
    [
        (killed, 4, -signal.SIGKILL, ""),
        (refused, 2, 1, "error: my own mistake\n"),
        (broken, 2, 1, "ZeroDivisionError\n"),
    ],
)
def test_all_end_soon_after_one_has(tmp_path, how, count, code, message):
    results = joined(tmp_path, count, 1, functools.partial(fail, how, count - 1)).results()
    failed = results.pop()
    assert failed.returncode == code
    assert failed.stderr.endswith(message)
    assert all(map(tells_of_another, results)), results


@pytest.mark.slow
def test_all_end_soon_after_the_first_has_been_killed(tmp_path):
    results = joined(tmp_path, 4, 1, functools.partial(fail, killed, 0)).results()
    assert all(map(tells_of_another, results[1:])), results


def end_before_the_other_fails():
    if jax.process_index() == 1:
        time.sleep(1)
        raise ZeroDivisionError


@pytest.mark.slow
def test_who_is_done_waits_for_the_others_to_fail(tmp_path):
    done, failed = joined(tmp_path, 2, 1, end_before_the_other_fails).results()
    assert tells_of_another(done)
    assert failed.returncode == 1


def make_the_same_mistake():
    time.sleep(jax.process_index())
    raise SystemExit("error: a mistake")


@pytest.mark.slow
def test_a_mistake_of_all_is_told_by_all(tmp_path):
    for result in joined(tmp_path, 2, 1, make_the_same_mistake).results():
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.splitlines()[-1] == "error: a mistake"


def stop(seconds):
    time.sleep(seconds * jax.process_index())
    raise SystemExit(EXIT_CODE)


@pytest.mark.slow
def test_a_stop_is_no_failure(tmp_path):
    results = joined(tmp_path, 2, 1, functools.partial(stop, 1)).results()
    assert [result.returncode for result in results] == [EXIT_CODE] * 2
