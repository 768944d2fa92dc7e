"""Deadlines and waits under a clock that a test has stopped."""

from __future__ import annotations

import threading
import time

import pytest

from pytest_fcvm.host.clock import Deadline, monotonic, wait_on, wait_until


@pytest.fixture(autouse=True)
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time module as a test library leaves it that stops time."""
    for name in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: 1.0)
    monkeypatch.setattr(time, "sleep", lambda _: None)


def test_monotonic_advances_while_time_is_frozen() -> None:
    before = monotonic()
    threading.Event().wait(0.01)
    assert 0.009 < monotonic() - before < 10


def test_a_deadline_passes() -> None:
    deadline = Deadline(0.02)
    assert 0 < (deadline.remaining() or 0) <= 0.02
    assert not deadline.expired
    threading.Event().wait(0.03)
    assert deadline.remaining() == 0.0
    assert deadline.expired
    assert str(deadline) == "0.02 s"


def test_no_deadline_never_passes() -> None:
    deadline = Deadline(None)
    assert deadline.remaining() is None
    assert not deadline.expired
    assert str(deadline) == "no deadline"


def test_wait_on_returns_the_value_or_a_false_one_at_the_deadline() -> None:
    condition, value = threading.Condition(), list[int]()

    def produce() -> None:
        with condition:
            value.append(7)
            condition.notify_all()

    with condition:
        assert not wait_on(condition, lambda: value, Deadline(0.01))
        thread = threading.Thread(target=produce)
        thread.start()
        assert wait_on(condition, lambda: value, Deadline(10)) == [7]
        assert wait_on(condition, lambda: value, Deadline(0)) == [7]
    thread.join()


def test_wait_on_accepts_a_timeout_longer_than_that_of_a_lock() -> None:
    condition = threading.Condition()
    answers = iter([0, 0, 1])
    stop = threading.Event()

    def poke() -> None:
        while not stop.wait(0.001):
            with condition:
                condition.notify_all()

    thread = threading.Thread(target=poke)
    thread.start()
    with condition:
        assert wait_on(condition, lambda: next(answers), Deadline(1e300)) == 1
    stop.set()
    thread.join()


def test_wait_until_polls_until_the_predicate_is_true() -> None:
    answers = iter([None, "", "yes"])
    assert wait_until(lambda: next(answers), Deadline(10), interval_s=0.001) == "yes"


def test_wait_until_polls_at_least_once_and_once_more_at_the_deadline() -> None:
    asked: list[int] = []
    assert wait_until(lambda: asked.append(1), Deadline(0)) is None
    assert len(asked) == 1
    started = monotonic()
    assert not wait_until(lambda: asked.append(1), Deadline(0.05), interval_s=0.02)
    assert 0.05 <= monotonic() - started < 5
    assert len(asked) >= 4


def test_wait_until_polls_at_once_when_wake_is_set() -> None:
    wake, asked = threading.Event(), threading.Event()

    def predicate() -> bool:
        if asked.is_set():
            return True
        asked.set()
        wake.set()  # between question and wait: must not be lost
        return False

    started = monotonic()
    assert wait_until(predicate, Deadline(30), interval_s=20, wake=wake)
    assert monotonic() - started < 10
