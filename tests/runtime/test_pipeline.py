"""One batch ahead of the host, in order, and nothing lost that was under way when stopped."""

import collections
import weakref

import jax.numpy as jnp
import numpy as np
import pytest

from jax_ddpm.runtime.pipeline import run_ahead
from jax_ddpm.runtime.stopping import Stopped


def stop_after(polls):
    """A poll that raises Stopped at its call number ``polls``, counted from 0."""
    allowed = iter(range(polls))

    def poll():
        if next(allowed, None) is None:
            raise Stopped("SIGTERM")

    return poll


def square(item):
    return jnp.asarray(item) ** 2


def collect(run):
    """The items that a run yields until it ends or raises, and its exception."""
    seen = []
    try:
        seen.extend(run)
    except BaseException as error:
        return seen, error
    return seen, None


@pytest.mark.parametrize("number", [0, 1, 2, 3, 7])
def test_every_item_once_in_order_with_its_own_result(number):
    items = [7 * i % 11 for i in range(number)]
    found = list(run_ahead(square, iter(items)))
    assert [item for item, _ in found] == items
    assert [int(result) for _, result in found] == [item**2 for item in items]


def test_results_are_on_the_host_whatever_tree_they_are():
    ((_, result),) = run_ahead(lambda item: {"a": (square(item), None)}, [3])
    assert isinstance(result["a"][0], np.ndarray)
    assert result["a"][1] is None


def test_equal_items_and_items_that_are_false():
    """None is an item too, not a sign of the end."""
    items = [0, None, 0, "", None]
    assert [item for item, _ in run_ahead(lambda item: item, items)] == items


def test_launches_one_ahead_and_no_further():
    launched = []

    def launch(item):
        launched.append(item)
        return item

    run = run_ahead(launch, range(5))
    assert not launched, "nothing before it is asked for"
    for seen in range(5):
        next(run)
        assert launched == list(range(min(seen + 2, 5)))
    assert next(run, None) is None


def test_takes_items_only_as_it_goes():
    """The items may thus be endless."""
    taken = []
    run = run_ahead(square, (taken.append(i) or i for i in iter(int, 1)))
    next(run), next(run)
    assert len(taken) == 3


def test_polls_before_each_item_and_not_after_the_last():
    events = []

    def launch(item):
        events.append(item)
        return item

    list(run_ahead(launch, "abc", poll=lambda: events.append("poll")))
    assert events == ["poll", "a", "poll", "b", "poll", "c"]


@pytest.mark.parametrize("polls", range(6))
def test_stopped_passes_on_after_what_was_under_way(polls):
    """Exactly what was launched has been yielded, with the signal that stopped it."""
    launched = []

    def launch(item):
        launched.append(item)
        return square(item)

    seen, error = collect(run_ahead(launch, range(5), stop_after(polls)))
    assert launched == list(range(min(polls, 5)))
    assert [item for item, _ in seen] == launched
    assert [int(result) for _, result in seen] == [item**2 for item in launched]
    if polls < 5:
        assert isinstance(error, Stopped)
        assert str(error) == "SIGTERM"
    else:
        assert error is None, "what was done when the signal came is done"


def test_another_exception_of_the_poll_passes_on_at_once():
    def poll():
        raise KeyboardInterrupt

    assert isinstance(collect(run_ahead(square, [1], poll))[1], KeyboardInterrupt)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, Stopped])
@pytest.mark.parametrize("at", range(4))
def test_an_exception_in_launch_passes_on(kind, at):
    """No result is then taken for another's, and nothing more is launched."""
    launched = []

    def launch(item):
        launched.append(item)
        if item == at:
            raise kind("broken")
        return square(item)

    seen, error = collect(run_ahead(launch, range(4)))
    assert type(error) is kind
    assert launched == list(range(at + 1))
    assert [item for item, _ in seen] == list(range(at))[: len(seen)]
    assert all(result == item**2 for item, result in seen)


def test_an_exception_of_the_items_passes_on():
    def items():
        yield 1
        raise OSError("unreadable")

    assert isinstance(collect(run_ahead(square, items()))[1], OSError)


def test_an_exception_of_the_caller_launches_nothing_more():
    launched = []
    run = run_ahead(lambda item: launched.append(item), range(9))
    with pytest.raises(ZeroDivisionError):
        collections.deque(1 / 0 for _ in run)
    assert launched == [0, 1]


def test_closed_early_it_polls_and_launches_nothing_more():
    events = []

    def launch(item):
        events.append(item)
        return item

    run = run_ahead(launch, range(9), poll=lambda: events.append("poll"))
    next(run)
    before = list(events)
    run.close()
    assert events == before
    assert next(run, None) is None


class Result:
    """A result that takes memory until it is let go."""


def test_holds_two_results_at_most():
    """The one handed out is the caller's alone, however many follow."""
    held = []

    def launch(item):
        held.append(weakref.ref(result := Result()))
        return result

    def alive():
        return sum(reference() is not None for reference in held)

    run = run_ahead(launch, range(9))
    for _ in range(6):
        next(run)
        assert alive() <= 2
