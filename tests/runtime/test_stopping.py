"""A signal asks once, between two steps, and then acts as it always did."""

import os
import signal
import subprocess
import sys

import pytest

from jax_ddpm.runtime import stopping
from jax_ddpm.runtime.stopping import Stopped, StopRequest, never

SIGNALS = (signal.SIGTERM, signal.SIGINT)
both_signals = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


@pytest.fixture(autouse=True)
def earlier():
    """The signals that came to handlers installed before, and still there afterwards."""
    received = []

    def handler(number, frame):
        received.append(number)

    before = {number: signal.signal(number, handler) for number in SIGNALS}
    yield received
    now = {number: signal.signal(number, before[number]) for number in SIGNALS}
    assert now == dict.fromkeys(SIGNALS, handler)


def send(number):
    os.kill(os.getpid(), number)


@both_signals
def test_the_first_signal_only_makes_polls_raise(earlier, number):
    with StopRequest() as stop:
        stop.poll()
        send(number)
        for _ in range(2):
            with pytest.raises(Stopped, match=f"^{number.name}$"):
                stop.poll()
    assert earlier == []


@both_signals
@pytest.mark.parametrize("first", SIGNALS, ids=lambda number: number.name)
def test_the_second_signal_acts_as_it_always_did(earlier, first, number):
    with StopRequest() as stop:
        send(first)
        send(number)
        assert earlier == [number]
        with pytest.raises(Stopped, match=f"^{first.name}$"):
            stop.poll()


def test_a_second_ctrl_c_interrupts():
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest():
            send(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, handler)


def test_without_a_signal_nothing_happens(earlier, capfd):
    with StopRequest() as stop:
        stop.poll()
    stop.poll()
    never()
    assert capfd.readouterr() == ("", "")


@both_signals
def test_afterwards_signals_act_as_before(earlier, number):
    with pytest.raises(ZeroDivisionError), StopRequest() as stop:
        raise ZeroDivisionError
    send(number)
    assert earlier == [number]
    stop.poll()


@both_signals
def test_says_what_it_does_on_stderr(capfd, number):
    with StopRequest():
        send(number)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"{number.name}: ")
    assert err.count("\n") == 1


def test_stderr_may_be_gone(monkeypatch):
    """Ctrl-C may also end the ``tee`` that the output goes to."""

    def write(*_):
        raise BrokenPipeError

    with StopRequest() as stop:
        with monkeypatch.context() as patch:
            patch.setattr(stopping.os, "write", write)
            send(signal.SIGINT)
        with pytest.raises(Stopped, match="SIGINT"):
            stop.poll()


def test_a_second_sigterm_ends_the_process():
    program = """
import os, signal
from jax_ddpm.runtime.stopping import Stopped, StopRequest
with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    try:
        stop.poll()
    except Stopped:
        print("asked", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", flush=True)
"""
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (child.returncode, child.stdout) == (-signal.SIGTERM, "asked\n")
