"""Groups: clones of several images on one network, which start and end together."""

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
    from pytest_fcvm.snapshot import OpenSnapshot

__all__ = ["Group", "check_depends_on", "start_group"]

DependsOn = Mapping[str, tuple[str, ...]]


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


def check_depends_on(depends_on: DependsOn) -> None:
    """Raise UsageProblem for a name that is not in the group, and for names that depend on each other."""
    for name, others in depends_on.items():
        for other in others:
            if other not in depends_on:
                raise UsageProblem(
                    f"{name!r} depends on {other!r}, which is not in the group",
                    hint=f"names in the group: {', '.join(depends_on)}",
                )
    try:
        TopologicalSorter(depends_on).prepare()
    except CycleError as error:
        raise UsageProblem(
            f"{' depends on '.join(reversed(error.args[1]))}", hint="remove one of them from depends_on"
        ) from None


def start_group(snapshots: Mapping[str, OpenSnapshot], depends_on: DependsOn, network: Network) -> Group:
    """Start a clone of each snapshot under its name, those that do not depend on each other at the same time.

    A clone that depends on others is started when they are ready, and is ready when its own condition holds. Raise the
    error of the first clone that fails, with its name in front; no clone is left then.
    """
    order = TopologicalSorter(depends_on)
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
                start = _starter(snapshots[name], name, network, closers, is_dependent=bool(depends_on[name]))
                starting[workers.submit(start)] = name
            for future in wait(starting, return_when=FIRST_COMPLETED).done:
                name = starting.pop(future)
                clones[name] = _result(future, name)
                order.done(name)
        return Group(network, {name: clones[name] for name in snapshots}, closers.pop_all())


def _starter(
    snapshot: OpenSnapshot, name: str, network: Network, closers: ExitStack, *, is_dependent: bool
) -> Callable[[], Clone]:
    """Return a function that starts a clone. `closers` owns the clone at once: the caller may have given up."""

    def start() -> Clone:
        clone = snapshot.clone(name=name, networks=[network])
        closers.callback(clone.close)
        if is_dependent:
            snapshot.verify(clone)
        return clone

    return start


def _result(future: Future[Clone], name: str) -> Clone:
    try:
        return future.result()
    except FcvmError as error:
        error.message = f"{name}: {error.message}"
        raise
