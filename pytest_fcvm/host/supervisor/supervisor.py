"""pytest's side of the process tree: request processes, and receive reports of their ends. The other is `guard.py`.

A pytest process has one supervisor. Its guard is exec'd, never forked from pytest. However pytest dies, everything that
the guard has spawned is gone within a second, and the run directory with it.
"""

from __future__ import annotations

import errno
import select
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

from pytest_fcvm.errors import HostError, UsageProblem
from pytest_fcvm.host.limits import host_error, lacks_processes, process_limit_hint
from pytest_fcvm.host.own import check_owner, environment, find_program, getpid, os
from pytest_fcvm.host.paths import make_child_dir
from pytest_fcvm.host.sockets import socket_pair
from pytest_fcvm.host.supervisor import messages
from pytest_fcvm.host.supervisor.child import Child, ChildExit
from pytest_fcvm.host.threads import ServiceThread

__all__ = ["Child", "ChildExit", "Supervisor"]

_ANSWER_S = 30.0
_CLOSE_S = 10.0
_LOG = "guard.log"
_EXTRA_DIR = messages.EXTRA_DIR.decode()
_LOG_TAIL = 4000
# Import the guard as a module, so that its bytecode is cached (saves 5 ms). Skip the packages' own `__init__` (another
# 5 ms) and `site` (20 ms).
_BOOTSTRAP = """\
import sys
for name, directory in zip(("pytest_fcvm", "pytest_fcvm.host", "pytest_fcvm.host.supervisor"), {directories!r}):
    sys.modules[name] = type(sys)(name)
    sys.modules[name].__path__ = [directory]
from pytest_fcvm.host.supervisor.guard import main
main()
"""


class Supervisor:
    """Spawn processes that cannot outlive pytest. Any thread may call any method.

    In a forked child of pytest, `close` only closes the child's copies of descriptors, `Child.kill` does nothing, and
    `spawn` raises UsageProblem.
    """

    def __init__(self, run_dir: Path, control: socket.socket, events: socket.socket, guard: int, log: int) -> None:
        self.run_dir = run_dir
        self.guard_pid = guard
        self._guard = os.pidfd_open(guard)
        self._control, self._events, self._log = control, events, log
        self._owner = getpid()
        self._isolation = ""
        self._asking = threading.Lock()  # one request and its answer at a time
        self._table = threading.Lock()
        self._children: dict[int, Child] = {}
        self._thread: threading.Thread | None = None
        self._numbers = count(1)
        self._serials = count(1)
        self._closed = False

    @classmethod
    def start(cls, run_dir: Path, *, namespaces: bool | None = None, extra_dir: Path | None = None) -> Supervisor:
        """Exec the guard and return at once; the first spawn waits for the guard.

        The guard removes `run_dir` when the supervisor or pytest ends, `extra_dir` when pytest ends without `close`.
        `namespaces=False`, or FCVM_NO_NAMESPACES=1 in the environment, disables the PID namespace. Raise HostError.
        """
        if namespaces is None:
            namespaces = environment().get("FCVM_NO_NAMESPACES", "") in ("", "0")
        with ExitStack() as undo, ExitStack() as passed:
            try:
                control, far_control = _socket_pair(undo, passed)
                events, far_events = _socket_pair(undo, passed)
                log = os.open(run_dir / _LOG, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
                undo.callback(os.close, log)
                if extra_dir:
                    (run_dir / _EXTRA_DIR).symlink_to(extra_dir)
                pytest = os.pidfd_open(getpid())
                passed.callback(os.close, pytest)
                ends = {
                    messages.CONTROL: far_control.fileno(),
                    messages.EVENTS: far_events.fileno(),
                    messages.PYTEST: pytest,
                }
                guard = _exec_guard(run_dir, ends | {1: log, 2: log}, namespaces)
                undo.callback(_reap, guard)
                supervisor = cls(run_dir, control, events, guard, log)
            except OSError as error:
                if error.errno == errno.ENOSYS:
                    raise HostError(
                        "this kernel is too old for the supervisor", hint="use Linux 5.4 or newer"
                    ) from error
                known = host_error("the supervisor", error)
                message = f"the supervisor cannot be started: {error.strerror} ({error.filename or 'no file'})"
                raise HostError(message, hint=known.hint) from error
            undo.pop_all()
        return supervisor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def isolation(self) -> str:
        """Return what ends the tree's processes, `namespace` or `subreaper`. Wait until the guard reports it."""
        with self._asking:
            while not self._isolation:
                self._receive_answer()
            return self._isolation

    def make_dir(self, name: str) -> Path:
        """Create a private directory for one process, with a short path and a name that is never used again."""
        return make_child_dir(self.run_dir, name, next(self._serials))

    def spawn(
        self,
        argv: Sequence[str | Path],
        *,
        name: str,
        stdout: Path,
        fds: Mapping[int, int] | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        nice: int = 0,
        owned_dir: Path | None = None,
    ) -> Child:
        """Start a program in a session of its own, without our descriptors and signal settings. Return its Child.

        fds: descriptor numbers in the child, and which of our descriptors each one is. Ours stay open. By default 0 is
        /dev/null.
        stdout: the file to which stdout and stderr are appended, relative to `owned_dir`, else `cwd`, else the run
        directory. The program also starts in that directory, unless there is a `cwd`.
        env: the whole environment; None for that of pytest when the supervisor started. nice: added to pytest's own.
        owned_dir: removed when the process has ended and `Child.kill` was called, or when the spawn failed.
        Raise HostError when the program cannot be started.
        """
        default_dir = owned_dir or cwd or self.run_dir
        given = dict(fds or {})
        request = (
            [os.fsencode(part) for part in _resolve_program(argv)],
            os.fsencode(default_dir / stdout),
            os.fsencode(cwd or default_dir),
            None if env is None else {os.fsencode(key): os.fsencode(value) for key, value in env.items()},
            nice,
            list(given),
            None if owned_dir is None else os.fsencode(owned_dir),
        )
        return self._start(name, request, list(given.values()))

    def close(self) -> None:
        """Kill every process, remove the run directory, and wait for both. Idempotent."""
        if getpid() != self._owner:
            self._drop_descriptors()
            return
        with self._table:
            if self._closed:
                return
            self._closed = True
            thread = self._thread
        with ExitStack() as last:
            last.callback(self._drop_descriptors)
            self._end_guard(thread)

    def _end_guard(self, thread: threading.Thread | None) -> None:
        (self.run_dir / _EXTRA_DIR).unlink(missing_ok=True)  # the owner of that directory removes it
        with suppress(OSError):  # shut down, because a forked child may hold copies
            self._control.shutdown(socket.SHUT_RDWR)
        if not _wait_readable(self._guard, _CLOSE_S):
            signal.pidfd_send_signal(self._guard, signal.SIGKILL)
            _wait_readable(self._guard, _CLOSE_S)
        with suppress(ChildProcessError):  # a test reaped the guard
            os.waitpid(self.guard_pid, os.WNOHANG)
        if thread is not None and thread is not threading.current_thread():
            thread.join(_CLOSE_S)

    def _drop_descriptors(self) -> None:
        self._control.close()
        self._events.close()
        for name in ("_guard", "_log"):
            descriptor = getattr(self, name)
            setattr(self, name, -1)
            if descriptor >= 0:
                os.close(descriptor)

    def _start(self, name: str, request: tuple[object, ...], descriptors: Sequence[int]) -> Child:
        check_owner(self._owner)  # before taking a lock, which another thread may have held at the fork
        number = next(self._numbers)
        child = Child(name, end=lambda: self._request_end(number))
        try:
            with self._asking:
                self._ask(number, child, request, descriptors)
                child.attach(*self._take_answer(number, name))
        except BaseException:
            self._request_end(number)  # also when a signal handler raised between request and answer
            raise
        return child

    def _ask(self, number: int, child: Child, request: tuple[object, ...], descriptors: Sequence[int]) -> None:
        with self._table:  # held during the request, so that the child is in the table before its end is reported
            if self._closed:
                raise UsageProblem("the supervisor is closed", hint="start no VM after the session's end")
            try:
                messages.send(self._control, (messages.OP_SPAWN, number, *request), descriptors)
            except ConnectionError:
                raise self._death_error() from None
            except OSError as error:
                raise HostError(
                    f"{child.name} cannot be started: {error.strerror}", hint="shorten its arguments and environment"
                ) from error
            if self._thread is None:
                self._start_listening()
            self._children[number] = child

    def _start_listening(self) -> None:
        self._thread = ServiceThread(self._listen, name="fcvm-exits")
        try:
            self._thread.start()
        except BaseException:
            if self._thread.ident is None:
                self._thread = None  # the next spawn tries again, and `close` waits for none
            raise

    def _take_answer(self, number: int, name: str) -> tuple[int, int]:
        while True:
            answer, received = self._receive_answer()
            if answer[0] == number:
                break
            for descriptor in received:  # of an interrupted spawn, whose end was requested
                os.close(descriptor)
        _, pid, code, what = answer
        if code:
            raise _refusal(name, code, os.fsdecode(what))
        if not received:
            raise HostError(f"{name} cannot be watched: no file descriptor is left", hint="raise ulimit -n")
        return _visible_pid(received[0]) or pid, received[0]

    def _receive_answer(self) -> tuple[messages.Message, list[int]]:
        self._control.settimeout(_ANSWER_S)
        try:
            answer, descriptors = messages.receive(self._control)
        except TimeoutError:
            raise HostError(
                f"the supervisor did not answer within {_ANSWER_S:g} s", evidence=self._evidence()
            ) from None
        if answer is None:
            raise self._death_error()
        if answer[0] == 0:
            self._isolation = answer[3].decode()
        return answer, descriptors

    def _death_error(self) -> HostError:
        evidence = self._evidence()
        hint = "look in dmesg for the kernel's OOM killer, or find out what killed fcvm-guard; then start pytest again"
        if lacks_processes("".join(evidence.values())):
            hint = process_limit_hint()
        return HostError("the supervisor has died and all VMs of this process with it", hint=hint, evidence=evidence)

    def _evidence(self) -> dict[str, str]:
        size = os.fstat(self._log).st_size
        text = os.pread(self._log, _LOG_TAIL, max(0, size - _LOG_TAIL)).decode("utf-8", "replace")
        return {"supervisor log": text} if text else {}

    def _request_end(self, number: int) -> None:
        with suppress(OSError):  # the spawner has ended, and every process and directory with it
            messages.send(self._control, (messages.OP_END, number))

    def _listen(self) -> None:
        """Receive reports of ends, as long as there is a child."""
        while True:
            report, _ = messages.receive(self._events)
            if report is None:
                self._end_all()
                return
            number, status = report
            with self._table:
                child = self._children.get(number)
            if child is not None and status is not None:
                child.finish(ChildExit(signal=-status) if status < 0 else ChildExit(code=status))
            with self._table:
                self._children.pop(number, None)
                if not self._children:
                    self._thread = None
                    return

    def _end_all(self) -> None:
        with self._table:
            children, self._children = self._children, {}
            self._thread = None
        for child in children.values():
            if child.pidfd >= 0:
                _wait_readable(child.pidfd, 1.0)  # the kernel is killing it; report the end only after the end
            child.finish(ChildExit(signal=int(signal.SIGKILL)))


def _socket_pair(undo: ExitStack, passed: ExitStack) -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket_pair(socket.SOCK_SEQPACKET)
    undo.callback(ours.close)
    passed.callback(theirs.close)
    for end in (ours, theirs):  # one packet holds all arguments and the environment of a spawn
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, messages.MESSAGE_LIMIT)
    return ours, theirs


def _exec_guard(run_dir: Path, given: Mapping[int, int], namespaces: bool) -> int:
    if not sys.executable:
        raise HostError("this Python does not know its own path", hint="run pytest with a Python that is a file")
    here = Path(__file__).parent
    code = _BOOTSTRAP.format(directories=[str(here.parents[1]), str(here.parent), str(here)])
    argv = [sys.executable, "-I", "-S", "-c", code, str(run_dir)]
    argv.append("auto" if namespaces else "subreaper")
    lifted = messages.duplicate_above(given)
    try:
        return os.posix_spawn(
            sys.executable,
            argv,
            environment(),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0),
                *((os.POSIX_SPAWN_DUP2, source, target) for target, source in lifted.items()),
            ],
            setsid=True,
            setsigmask=(),
            setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
        )
    finally:
        for descriptor in set(lifted.values()) - set(given.values()):
            os.close(descriptor)


def _reap(guard: int) -> None:
    """Kill a guard whose supervisor was not made."""
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(guard, signal.SIGKILL)
        os.waitpid(guard, 0)


def _resolve_program(argv: Sequence[str | Path]) -> list[str]:
    program = str(argv[0])
    found = program if "/" in program else find_program(program)
    if found is None:
        raise HostError(f"{program} is not installed", hint=f"install {program}, or see `fcvm doctor`")
    return [found, *map(str, argv[1:])]


def _refusal(name: str, code: int, what: str) -> HostError:
    reason = os.strerror(code)
    known = host_error(name, OSError(code, reason, what))
    hint = "install what is missing" if code == errno.ENOENT else known.hint
    return HostError(f"{name} cannot be started: {reason} ({what})", hint=hint)


def _visible_pid(pidfd: int) -> int:
    """Return the process id that `ps` shows: the `Pid:` line of a pidfd's fdinfo (proc_pid_fdinfo(5))."""
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
            if line.startswith("Pid:"):
                return max(0, int(line[4:]))
    return 0


def _wait_readable(descriptor: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
