"""Spawn processes, reap them, and report their ends. It is the guard's child."""

# ruff: noqa: SIM105 - contextlib is an import that costs

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` imports enum: 6 ms
import errno
import os
import select

from pytest_fcvm.host import libc
from pytest_fcvm.host.supervisor import messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable, Mapping, Sequence
    from typing import TypeAlias

    from pytest_fcvm.host.supervisor.messages import Message

    Start: TypeAlias = Callable[[list[bytes], Mapping[bytes, bytes], Sequence[tuple[int, int]]], int]

__all__ = ["IGNORED", "Spawner", "kill_quietly", "remove_tree", "spawn_bound", "spawn_fast"]

IGNORED = (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP)  # guard and spawner end only with pytest
_TO_DEFAULT = (*IGNORED, _signal.SIGCHLD, _signal.SIGPIPE, _signal.SIGXFSZ)  # Python ignores the last two


class Spawner:
    """Serve requests, reap processes, and report their ends. There is one per supervisor."""

    def __init__(self, control: _socket.socket, events: _socket.socket, start: Start) -> None:
        self._control, self._events, self._start = control, events, start
        self._ids: dict[int, int] = {}  # pid -> id
        self._pids: dict[int, int] = {}
        self._owned: dict[int, bytes] = {}
        self._end_requested: set[int] = set()
        self._null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)

    def serve(self, guard: int) -> None:
        """Serve until the supervisor shuts its end, or until the guard, known by its pidfd, has died."""
        ended, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        _signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        _signal.signal(_signal.SIGCHLD, lambda _number, _frame: None)
        watch = select.poll()
        for descriptor in (self._control.fileno(), ended, guard):
            watch.register(descriptor, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in watch.poll()}
            if guard in ready:
                return
            if ended in ready:
                os.read(ended, 4096)
                self._reap()
            if self._control.fileno() in ready and not self._serve_one():
                return

    def _serve_one(self) -> bool:
        message, descriptors = messages.receive(self._control)
        if message is None:
            return False
        try:
            if message[0] == messages.OP_SPAWN:
                self._spawn(message, descriptors)
            else:
                self._end(message[1])
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _spawn(self, request: Message, descriptors: Sequence[int]) -> None:
        _, number, argv, stdout, cwd, env, nice, targets, owned = request
        if owned is not None:
            self._owned[number] = owned
        pid, pidfd = 0, -1
        try:
            if len(descriptors) != len(targets):  # the kernel drops descriptors that find no room
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            pid = self._launch(argv, stdout, cwd, env, dict(zip(targets, descriptors, strict=True)))
            pidfd = os.pidfd_open(pid)
            if nice:
                os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, 0) + nice)
        except (OSError, ValueError) as error:
            if pid:
                os.kill(pid, _signal.SIGKILL)
                os.waitpid(pid, 0)
            self._refuse(number, error)
        else:
            self._ids[pid], self._pids[number] = number, pid
            messages.send(self._control, (number, pid, 0, b""), [pidfd])
        finally:
            if pidfd >= 0:
                os.close(pidfd)

    def _refuse(self, number: int, error: OSError | ValueError) -> None:
        code = getattr(error, "errno", None) or errno.EINVAL  # a ValueError: a zero byte in an argument
        what = getattr(error, "filename", None) or str(error)
        messages.send(self._control, (number, 0, code, os.fsencode(what)))
        messages.send(self._events, (number, None))
        self._remove(number)

    def _launch(
        self, argv: list[bytes], stdout: bytes, cwd: bytes, env: dict[bytes, bytes] | None, given: dict[int, int]
    ) -> int:
        os.chdir(cwd)  # posix_spawn has no chdir, and this process has no other thread
        output = os.open(stdout, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        plan = {0: self._null, 1: output, 2: output} | given
        opened = {output}
        try:
            lifted = messages.duplicate_above(plan)
            opened |= {*lifted.values()} - {*given.values(), self._null}
            return self._start(argv, os.environb if env is None else env, [(lifted[t], t) for t in plan])
        finally:
            for descriptor in opened:
                os.close(descriptor)
            os.chdir("/")

    def _end(self, number: int) -> None:
        """Kill a process if it runs, and remove its directory after its end."""
        self._end_requested.add(number)
        if number in self._pids:
            os.kill(self._pids[number], _signal.SIGKILL)
        else:
            self._remove(number)

    def _reap(self) -> None:
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            pid = found.si_pid
            number = self._ids.pop(pid, None)
            if number is not None:  # not an orphan of a child. Kill its group before reaping, which frees the id
                kill_quietly(os.killpg, pid)
            status = os.waitpid(pid, 0)[1]
            if number is not None:
                del self._pids[number]
                messages.send(self._events, (number, os.waitstatus_to_exitcode(status)))
                if number in self._end_requested:
                    self._remove(number)

    def _remove(self, number: int) -> None:
        self._end_requested.discard(number)
        owned = self._owned.pop(number, None)
        if owned is not None:
            remove_tree(owned)


def spawn_fast(argv: list[bytes], env: Mapping[bytes, bytes], plan: Sequence[tuple[int, int]]) -> int:
    """Start a program by posix_spawn, in 0.2 ms; a fork takes 1.3 ms. Raise OSError."""
    moves = [(os.POSIX_SPAWN_DUP2, source, target) for source, target in plan]
    return os.posix_spawn(argv[0], argv, env, file_actions=moves, setsid=True, setsigmask=(), setsigdef=_TO_DEFAULT)


def spawn_bound(argv: list[bytes], env: Mapping[bytes, bytes], plan: Sequence[tuple[int, int]]) -> int:
    """Start a program that dies with this process, which posix_spawn does not offer. Raise OSError."""
    parent = os.getpid()
    failure, report = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
    except OSError:  # no process is left
        os.close(failure)
        os.close(report)
        raise
    if pid:
        os.close(report)
        code = os.read(failure, 16)
        os.close(failure)
        if code:
            os.waitpid(pid, 0)
            raise OSError(int(code), os.strerror(int(code)), argv[0])
        return pid
    try:
        highest = max(target for _, target in plan)
        report = messages.duplicate_above({highest: report})[highest]
        _become(parent, argv, env, plan)
    except (OSError, ValueError) as error:
        os.write(report, str(getattr(error, "errno", errno.EINVAL)).encode())
    finally:
        os._exit(127)


def _become(parent: int, argv: list[bytes], env: Mapping[bytes, bytes], plan: Sequence[tuple[int, int]]) -> None:
    libc.prctl(libc.PR_SET_PDEATHSIG, _signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the prctl
        os._exit(127)
    os.setsid()
    _signal.set_wakeup_fd(-1)
    for number in _TO_DEFAULT:
        _signal.signal(number, _signal.SIG_DFL)
    for source, target in plan:
        os.dup2(source, target)
    os.execve(argv[0], argv, env)  # noqa: S606 - the caller names the program


def remove_tree(path: bytes) -> None:
    """Remove a directory and everything in it. Follow no symlink, and leave to the janitor what cannot be removed."""
    try:
        entries = list(os.scandir(path))
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            remove_tree(entry.path)
        else:
            _quietly(os.unlink, entry.path)
    _quietly(os.rmdir, path)


def kill_quietly(how: Callable[[int, int], None], number: int) -> None:
    """Send SIGKILL by `os.kill` or `os.killpg`. Ignore a process that has ended."""
    try:
        how(number, _signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def _quietly(how: Callable[[bytes], None], path: bytes) -> None:
    try:
        how(path)
    except OSError:
        pass
