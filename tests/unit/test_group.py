"""Groups: the order in which clones start, and what is left when one fails. The snapshots are fakes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any, Self, cast

import pytest

from pytest_fcvm.errors import GuestError, HostError, UsageProblem
from pytest_fcvm.group import Group, check_depends_on, start_group

WAIT_S = 20.0


class Cluster:
    """Plays the snapshots of a group: notes what happens to their clones, and which are made at the same time."""

    def __init__(self) -> None:
        self.happened: list[str] = []
        self.fails: set[str] = set()
        self.holds: dict[str, threading.Event] = {}

    def start(self, depends_on: Mapping[str, tuple[str, ...]]) -> Group:
        snapshots = {name: _Snapshot(self) for name in depends_on}
        return start_group(cast(Any, snapshots), depends_on, cast(Any, "net"))


class _Asks:
    """Plays an event that is set, and does something in the thread that waits for it."""

    def __init__(self, ask: Callable[[], None]) -> None:
        self._ask = ask

    def wait(self, _timeout_s: float) -> bool:
        self._ask()
        return True


class _Snapshot:
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def clone(self, *, name: str, networks: list[Any]) -> _Clone:
        assert networks == ["net"]
        self._cluster.happened.append(f"start {name}")
        if name in self._cluster.holds:
            assert self._cluster.holds[name].wait(WAIT_S)
        if name in self._cluster.fails:
            raise GuestError("it did not come")
        return _Clone(name, self._cluster)

    def verify(self, clone: _Clone) -> None:
        self._cluster.happened.append(f"verify {clone.name}")


class _Clone:
    def __init__(self, name: str, cluster: Cluster) -> None:
        self.name, self._cluster = name, cluster

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._cluster.happened.append(f"close {self.name}")


def test_a_dependent_clone_starts_when_the_others_are_ready_and_ends_before_them() -> None:
    cluster = Cluster()
    group = cluster.start({"app": ("db", "cache"), "cache": ("db",), "db": ()})
    assert list(group) == ["app", "cache", "db"]
    assert group["db"].name == "db"
    assert cluster.happened == ["start db", "start cache", "verify cache", "start app", "verify app"]
    group.close()
    group.close()
    assert cluster.happened[5:] == ["close app", "close cache", "close db"]


def test_independent_clones_start_at_the_same_time() -> None:
    cluster = Cluster()
    cluster.holds = {"one": threading.Event(), "two": threading.Event()}
    started = threading.Thread(target=cluster.start, args=({"one": (), "two": ()},))
    started.start()
    for _ in range(2000):
        if len(cluster.happened) == 2:
            break
        threading.Event().wait(0.01)
    assert sorted(cluster.happened) == ["start one", "start two"]
    for event in cluster.holds.values():
        event.set()
    started.join(WAIT_S)
    assert not started.is_alive()


def test_its_threads_take_no_signal() -> None:
    cluster = Cluster()
    masks: list[set[signal.Signals]] = []
    cluster.holds = {"one": cast(Any, _Asks(lambda: masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))))}
    cluster.start({"one": ()}).close()
    assert masks[0] >= {signal.SIGINT, signal.SIGTERM}


def test_a_host_without_threads_is_a_host_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(HostError, match="no thread is left for a group"):
        Cluster().start({"one": ()})


def test_the_first_failure_is_raised_with_its_name_and_no_clone_is_left() -> None:
    cluster = Cluster()
    cluster.fails = {"cache"}
    with pytest.raises(GuestError, match=r"^cache: it did not come"):
        cluster.start({"db": (), "cache": ("db",), "app": ("cache",)})
    assert cluster.happened == ["start db", "start cache", "close db"]


def test_one_that_comes_up_after_another_has_failed_is_ended() -> None:
    cluster = Cluster()
    cluster.fails = {"bad"}
    cluster.holds = {"bad": threading.Event(), "slow": threading.Event()}
    threading.Timer(0.3, cluster.holds["bad"].set).start()
    threading.Timer(0.6, cluster.holds["slow"].set).start()
    with pytest.raises(GuestError, match=r"^bad: "):
        cluster.start({"bad": (), "slow": ()})
    assert [event for event in cluster.happened if "slow" in event] == ["start slow", "close slow"]


@pytest.mark.parametrize(
    ("depends_on", "message"),
    [
        ({"app": ("bd",), "db": ()}, "'app' depends on 'bd', which is not in the group"),
        ({"a": ("b",), "b": ("a",)}, "depends on"),
        ({"a": ("a",)}, "a depends on a"),
    ],
)
def test_unknown_and_circular_dependencies_are_usage_problems(
    depends_on: dict[str, tuple[str, ...]], message: str
) -> None:
    with pytest.raises(UsageProblem, match=message):
        check_depends_on(depends_on)
