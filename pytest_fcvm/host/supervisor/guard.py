"""Hold a run's processes together and end them all with pytest. Exec'd by `supervisor.py`, nothing but C modules.

    pytest ── guard ── spawner ── VMM, VMM, helper …

The guard watches pytest and the spawner. When either ends, or pytest shuts its socket, it kills what is left and
removes the run directory. The spawner (`spawner.py`) serves requests. Both are single threads, because PDEATHSIG
belongs to a thread. There are two ways to hold the tree together:

- `namespace`: the spawner is PID 1 of a PID namespace. The kernel kills everything in it when it dies, and it dies
  with the guard (PDEATHSIG).
- `subreaper`: where no namespace can be had. Each child has PDEATHSIG; guard and spawner are both subreapers, watch
  each other by pidfd, and the survivor kills all that the other left, however often it has forked. (Grandchildren
  survive only if guard and spawner are killed at the same moment.)

pytest is watched by a pidfd that it took itself: a forked child of a test may hold the sockets open after its death.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` imports enum: 6 ms
import _socket
import os
import select
import sys

from pytest_fcvm.host import libc
from pytest_fcvm.host.supervisor import messages, spawner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["main"]

NAMESPACE, SUBREAPER = b"namespace", b"subreaper"

_HIGHEST_DESCRIPTOR = 1 << 20  # with close_range(2) the span costs nothing


def main() -> None:
    """Become the guard and fork the spawner. Arguments: the run directory; `auto`, or `subreaper` for no namespace."""
    run_dir, wanted = (os.fsencode(argument) for argument in sys.argv[1:3])
    for descriptor in (messages.CONTROL, messages.EVENTS, messages.PYTEST):
        os.set_inheritable(descriptor, False)  # noqa: FBT003 - it takes no keyword
    os.closerange(messages.PYTEST + 1, _HIGHEST_DESCRIPTOR)
    for number in spawner.IGNORED:
        _signal.signal(number, _signal.SIG_IGN)
    os.chdir("/")
    isolation = NAMESPACE if wanted != SUBREAPER and _enter_namespace() else SUBREAPER
    if isolation == SUBREAPER:
        libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)
    guard = os.pidfd_open(os.getpid())
    pid = os.fork()
    if pid:
        libc.prctl(libc.PR_SET_NAME, b"fcvm-guard")
        os.close(messages.EVENTS)
        os.close(guard)
        _stand_guard(pid, run_dir, isolation)
    else:
        libc.prctl(libc.PR_SET_NAME, b"fcvm-spawner")
        _run_spawner(guard, isolation)
    os._exit(0)


def _run_spawner(guard: int, isolation: bytes) -> None:
    if isolation == NAMESPACE:
        libc.prctl(libc.PR_SET_PDEATHSIG, _signal.SIGKILL)
        start = spawner.spawn_fast
    else:
        libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)
        start = spawner.spawn_bound
    control, events = _socket.socket(fileno=messages.CONTROL), _socket.socket(fileno=messages.EVENTS)
    try:
        messages.send(control, (0, 0, 0, isolation))
        spawner.Spawner(control, events, start).serve(guard)
    except ConnectionError:
        pass  # pytest has gone between two of our steps
    if isolation == SUBREAPER:
        _end_descendants()


def _stand_guard(pid: int, run_dir: bytes, isolation: bytes) -> None:
    watch = select.poll()
    watch.register(os.pidfd_open(pid), select.POLLIN)
    watch.register(messages.PYTEST, select.POLLIN)
    watch.register(messages.CONTROL, 0)  # POLLHUP comes unasked when pytest's end is shut or gone
    watch.poll()
    os.kill(pid, _signal.SIGKILL)  # not reaped yet: the id cannot be anybody else's
    os.waitpid(pid, 0)  # in a namespace this returns when all in it are gone
    if isolation == SUBREAPER:
        _end_descendants()
    try:
        also = os.readlink(run_dir + b"/" + messages.ALSO_REMOVED)  # noqa: PTH115 - no pathlib here
    except OSError:  # pytest lives, or has nothing else
        also = b""
    spawner.remove_tree(run_dir)
    if also:
        spawner.remove_tree(also)


def _enter_namespace() -> bool:
    """Make the next fork PID 1 of a new namespace. A user namespace is tried out first: there is no way back."""
    try:
        libc.unshare(libc.CLONE_NEWPID)
    except OSError:
        if not _works_in_child(_enter_user_namespace):
            return False
        _enter_user_namespace()
    return True


def _enter_user_namespace() -> None:
    uid, gid = os.geteuid(), os.getegid()
    libc.unshare(libc.CLONE_NEWUSER | libc.CLONE_NEWPID)
    # Every user stays who they are; without a map files would seem to belong to nobody: user_namespaces(7).
    for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        descriptor = os.open(f"/proc/self/{file}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)


def _works_in_child(step: Callable[[], None]) -> bool:
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] == 0
    try:
        step()
        inner = os.fork()
        os._exit(0 if inner == 0 else os.waitpid(inner, 0)[1] != 0)
    finally:
        os._exit(1)


def _end_descendants() -> None:
    """Kill until no descendant is left. A subreaper gets the orphans of what it kills as its own children."""
    while children := list(_children()):
        for pid in children:
            spawner.kill_quietly(os.kill, pid)
        for _ in children:  # each of them ends; who else does is counted in the next round
            os.waitpid(-1, 0)


def _children() -> Iterator[int]:
    """Yield our children, also those we never started. (/proc/PID/task/TID/children is not in every kernel.)"""
    own = str(os.getpid())
    # Another PID namespace's /proc has numbers that mean somebody else here.
    if os.readlink("/proc/self") != own:  # noqa: PTH115 - pathlib is 8 ms of start-up
        return
    for entry in os.listdir("/proc"):  # noqa: PTH208
        if entry.isdigit() and _parent_of(entry) == own:
            yield int(entry)


def _parent_of(pid: str) -> str:
    try:
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        text = os.read(descriptor, 512).decode("ascii", "replace")
    except OSError:
        return ""
    finally:
        os.close(descriptor)
    return text.rpartition(")")[2].split()[1]  # the name before it may hold spaces and brackets
