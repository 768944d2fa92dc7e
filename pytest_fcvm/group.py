"""Machines of several images that make up one thing: started on one network, ready together, ended together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING

from pytest_fcvm.errors import FcvmError, UsageProblem
from pytest_fcvm.host.limits import translating_emfile
from pytest_fcvm.host.threads import block_signals

if TYPE_CHECKING:
    from pytest_fcvm.clone import Clone
    from pytest_fcvm.network.private import Network
    from pytest_fcvm.snapshot import Snapshot

__all__ = ["Group", "check_needs", "start_group"]

DependsOn = Mapping[str, tuple[str, ...]]
Failed = Callable[[str, FcvmError], object]


class Group(Mapping[str, "Clone"]):
    """Clones by name, on one private network. `close` ends them all, the dependent ones first."""

    def __init__(self, network: Network, clones: Mapping[str, Clone], closers: ExitStack) -> None:
        self.network, self._clones, self._closers = network, dict(clones), closers

    def __getitem__(self, name: str) -> Clone:
        return self._clones[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._clones)

    def __len__(self) -> int:
        return len(self._clones)

    def close(self) -> None:
        """End all clones; idempotent. The network stays."""
        self._closers.close()


def check_needs(needs: DependsOn) -> None:
    """Raise UsageProblem for a name that is not in the group, and for names that need each other."""
    for name, others in needs.items():
        for other in others:
            if other not in needs:
                raise UsageProblem(
                    f"{name!r} needs {other!r}, which is not there", hint=f"there are {', '.join(needs)}"
                )
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        raise UsageProblem(
            f"{' needs '.join(reversed(error.args[1]))}", hint="let one start without the other"
        ) from None


def start_group(snapshots: Mapping[str, Snapshot], needs: DependsOn, network: Network, failed: Failed) -> Group:
    """Start a clone of each snapshot under its name, those at once that do not need each other.

    One that needs others is started when they are ready, and is ready when its own condition holds. Raise what the
    first to fail raises, with its name, of which `failed` is told; none is left then.
    """
    order = TopologicalSorter(needs)
    order.prepare()
    clones: dict[str, Clone] = {}
    starting: dict[Future[Clone], str] = {}
    with (
        ExitStack() as closers,
        translating_emfile("a group"),
        ThreadPoolExecutor(thread_name_prefix="fcvm-group", initializer=block_signals) as workers,
        ExitStack() as late,
    ):
        late.callback(workers.shutdown, wait=False, cancel_futures=True)
        while order.is_active():
            for name in order.get_ready():
                begin = _starter(snapshots[name], name, network, closers, is_dependent=bool(needs[name]))
                starting[workers.submit(begin)] = name
            for future in wait(starting, return_when=FIRST_COMPLETED).done:
                name = starting.pop(future)
                clones[name] = _result(future, name, failed)
                order.done(name)
        return Group(network, {name: clones[name] for name in snapshots}, closers.pop_all())


def _starter(
    snapshot: Snapshot, name: str, network: Network, closers: ExitStack, *, is_dependent: bool
) -> Callable[[], Clone]:
    """Return a function that starts a clone, which is `closers`' at once: its caller may have given up meanwhile."""

    def start() -> Clone:
        clone = snapshot.clone(name=name, networks=[network])
        closers.callback(clone.close)
        if is_dependent:
            snapshot.verify(clone)
        return clone

    return start


def _result(future: Future[Clone], name: str, failed: Failed) -> Clone:
    try:
        return future.result()
    except FcvmError as error:
        error.message = f"{name}: {error.message}"
        failed(name, error)
        raise
