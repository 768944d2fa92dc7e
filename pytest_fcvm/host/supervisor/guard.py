"""End all processes of a run when pytest ends. `supervisor.py` execs this script, which imports C modules only.

    pytest ── guard ── spawner ── VMM, VMM, helper …

The guard watches pytest and the spawner. When either ends, or pytest shuts its socket down, the guard kills all other
processes and removes the run directory. The spawner (`spawner.py`) serves requests. Both have a single thread, because
PDEATHSIG belongs to a thread. There are two ways to end the tree:

- `namespace`: the spawner is PID 1 of a PID namespace. The kernel kills everything in the namespace when the spawner
  dies, and the spawner dies with the guard (PDEATHSIG).
- `subreaper`: where PID namespaces are unavailable. Each child has PDEATHSIG. Guard and spawner are both subreapers and
  watch each other by pidfd, and the survivor kills all descendants of the other. (Grandchildren survive only if guard
  and spawner are killed at the same moment.)

The guard watches pytest by a pidfd that pytest opened: a test's forked child may hold the sockets open after pytest's
death.
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

_HIGHEST_DESCRIPTOR = 1 << 20  # close_range(2) closes any number at once


def main() -> None:
    """Run the guard, and fork the spawner. Arguments: the run directory; `auto`, or `subreaper` for no namespace."""
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
        _run_guard(pid, run_dir, isolation)
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
        pass  # pytest has ended meanwhile
    if isolation == SUBREAPER:
        _end_descendants()


def _run_guard(pid: int, run_dir: bytes, isolation: bytes) -> None:
    watch = select.poll()
    watch.register(os.pidfd_open(pid), select.POLLIN)
    watch.register(messages.PYTEST, select.POLLIN)
    watch.register(messages.CONTROL, 0)  # poll always reports POLLHUP, here for the end of pytest's socket
    watch.poll()
    os.kill(pid, _signal.SIGKILL)  # the spawner is not reaped yet, so no other process has its id
    os.waitpid(pid, 0)  # for a namespace this returns when all its processes have ended
    if isolation == SUBREAPER:
        _end_descendants()
    try:
        extra_dir = os.readlink(run_dir + b"/" + messages.EXTRA_DIR)  # noqa: PTH115 - no pathlib here
    except OSError:  # pytest lives, or has no other directory
        extra_dir = b""
    spawner.remove_tree(run_dir)
    if extra_dir:
        spawner.remove_tree(extra_dir)


def _enter_namespace() -> bool:
    """Make the next fork PID 1 of a new namespace. Try a user namespace in a child first: it cannot be left again."""
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
    # Map our ids to themselves. Without a map all files would belong to nobody: user_namespaces(7).
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
    """Kill until no descendant is left. A subreaper becomes the parent of the orphans of the killed processes."""
    while children := list(_children()):
        for pid in children:
            spawner.kill_quietly(os.kill, pid)
        for _ in children:  # each of them ends; the next round finds the orphans
            os.waitpid(-1, 0)


def _children() -> Iterator[int]:
    """Yield our children, adopted orphans included. (Not every kernel has /proc/PID/task/TID/children.)"""
    own = str(os.getpid())
    # The process ids in another PID namespace's /proc are of other processes here.
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
