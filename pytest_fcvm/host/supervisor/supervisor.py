"""pytest's side of the process tree: ask for processes, hear of their ends. The other side is `guard.py`.

One supervisor per pytest process. Its guard is exec'd, never forked from pytest, and everything it ever spawned is gone
within a second of pytest's death, however pytest dies; the run directory goes with it.
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
from pytest_fcvm.host.limits import host_error, lacks_process, more_processes
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
_ALSO = messages.ALSO_REMOVED.decode()
_LOG_TAIL = 4000
# Imported from its directory, so that bytecode is cached (5 ms), but past the packages' own `__init__`, whose imports cost
# as much again, and without `site` (20 ms).
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

    In a forked child of pytest the supervisor is the parent's: `close` only drops the child's copies of descriptors,
    `Child.kill` does nothing and `spawn` is refused.
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
    def start(cls, run_dir: Path, *, namespaces: bool | None = None, also_removed: Path | None = None) -> Supervisor:
        """Exec the guard and return at once; the first spawn waits for it.

        `run_dir` is removed with all that is in it when the supervisor or pytest ends, `also_removed` when pytest does
        without `close`. `namespaces=False`, or FCVM_NO_NAMESPACES=1 in the environment, makes it do without a PID
        namespace. Raise HostError.
        """
        if namespaces is None:
            namespaces = environment().get("FCVM_NO_NAMESPACES", "") in ("", "0")
        with ExitStack() as undo, ExitStack() as passed:
            try:
                control, far_control = _socket_pair(undo, passed)
                events, far_events = _socket_pair(undo, passed)
                log = os.open(run_dir / _LOG, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
                undo.callback(os.close, log)
                if also_removed:
                    (run_dir / _ALSO).symlink_to(also_removed)
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
        """Return how the tree is held together, `namespace` or `subreaper`. Wait until the guard knows."""
        with self._asking:
            while not self._isolation:
                self._hear()
            return self._isolation

    def make_dir(self, name: str) -> Path:
        """Make a private directory for one process under the run directory, its path short, its name never reused."""
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
        """Start a program in a session of its own, with none of our descriptors and signal settings; return its Child.

        fds: which of our descriptors (they stay ours) the child gets under which number; 0 is /dev/null otherwise.
        stdout: the file that stdout and stderr are appended to; relative to `owned_dir`, else `cwd`, else the run
        directory, where the program also starts unless `cwd` says otherwise.
        env: the whole environment; None is that of pytest when the supervisor started. nice: added to pytest's own.
        owned_dir: removed when the process has ended and `Child.kill` was called, or the spawn failed.
        Raise HostError when it cannot be started.
        """
        home = owned_dir or cwd or self.run_dir
        given = dict(fds or {})
        request = (
            [os.fsencode(part) for part in _resolve_program(argv)],
            os.fsencode(home / stdout),
            os.fsencode(cwd or home),
            None if env is None else {os.fsencode(key): os.fsencode(value) for key, value in env.items()},
            nice,
            list(given),
            None if owned_dir is None else os.fsencode(owned_dir),
        )
        return self._start(name, request, list(given.values()))

    def close(self) -> None:
        """Kill every process, remove the run directory and wait for both; idempotent."""
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
        (self.run_dir / _ALSO).unlink(missing_ok=True)  # its owner lives, and removes it itself
        with suppress(OSError):  # shut, not closed: a forked child may hold copies
            self._control.shutdown(socket.SHUT_RDWR)
        if not _wait_readable(self._guard, _CLOSE_S):
            signal.pidfd_send_signal(self._guard, signal.SIGKILL)
            _wait_readable(self._guard, _CLOSE_S)
        with suppress(ChildProcessError):  # a test reaped it
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
        check_owner(self._owner)  # before a lock is taken that may have been held when the process was forked
        number = next(self._numbers)
        child = Child(name, end=lambda: self._describe_exit(number))
        try:
            with self._asking:
                self._ask(number, child, request, descriptors)
                child.attach(*self._take_answer(number, name))
        except BaseException:
            self._describe_exit(number)  # also when a signal handler raised between request and answer
            raise
        return child

    def _ask(self, number: int, child: Child, request: tuple[object, ...], descriptors: Sequence[int]) -> None:
        with self._table:  # held over the request, so that no end is reported of what is not in the table yet
            if self._closed:
                raise UsageProblem("the supervisor is closed", hint="no VM can be started after the session's end")
            try:
                messages.send(self._control, (messages.OP_SPAWN, number, *request), descriptors)
            except ConnectionError:
                raise self._lost() from None
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
            answer, received = self._hear()
            if answer[0] == number:
                break
            for descriptor in received:  # the answer to a spawn that was interrupted and has been ended since
                os.close(descriptor)
        _, pid, code, what = answer
        if code:
            raise _refusal(name, code, os.fsdecode(what))
        if not received:
            raise HostError(f"{name} cannot be watched: no file descriptor is left", hint="raise ulimit -n")
        return _visible_pid(received[0]) or pid, received[0]

    def _hear(self) -> tuple[messages.Message, list[int]]:
        self._control.settimeout(_ANSWER_S)
        try:
            answer, descriptors = messages.receive(self._control)
        except TimeoutError:
            raise HostError(
                f"the supervisor did not answer within {_ANSWER_S:g} s", evidence=self._evidence()
            ) from None
        if answer is None:
            raise self._lost()
        if answer[0] == 0:
            self._isolation = answer[3].decode()
        return answer, descriptors

    def _lost(self) -> HostError:
        evidence = self._evidence()
        hint = "look for the kernel's OOM killer in dmesg, or whoever killed fcvm-guard; then start pytest again"
        if lacks_process("".join(evidence.values())):
            hint = more_processes()
        return HostError("the supervisor has died and all VMs of this process with it", hint=hint, evidence=evidence)

    def _evidence(self) -> dict[str, str]:
        size = os.fstat(self._log).st_size
        text = os.pread(self._log, _LOG_TAIL, max(0, size - _LOG_TAIL)).decode("utf-8", "replace")
        return {"supervisor log": text} if text else {}

    def _describe_exit(self, number: int) -> None:
        with suppress(OSError):  # the spawner has gone, and every process and directory with it
            messages.send(self._control, (messages.OP_END, number))

    def _listen(self) -> None:
        """Take reports of ends while there is anything that may end."""
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
                _wait_readable(child.pidfd, 1.0)  # the kernel is at it; say so only when it is true
            child.finish(ChildExit(signal=int(signal.SIGKILL)))


def _socket_pair(undo: ExitStack, passed: ExitStack) -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket_pair(socket.SOCK_SEQPACKET)
    undo.callback(ours.close)
    passed.callback(theirs.close)
    for end in (ours, theirs):  # one packet holds arguments and environment of a spawn
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, messages.WIRE_LIMIT)
    return ours, theirs


def _exec_guard(run_dir: Path, given: Mapping[int, int], namespaces: bool) -> int:
    if not sys.executable:
        raise HostError("this Python does not know its own path", hint="run pytest by a Python on disk")
    here = Path(__file__).parent
    code = _BOOTSTRAP.format(directories=[str(here.parents[1]), str(here.parent), str(here)])
    argv = [sys.executable, "-I", "-S", "-c", code, str(run_dir)]
    argv.append("auto" if namespaces else "subreaper")
    lifted = messages.lift(given)
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
    """End a guard that nobody will watch."""
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
    """Return the id that `ps` knows it by: the `Pid:` line of a pidfd's fdinfo (proc_pid_fdinfo(5))."""
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
            if line.startswith("Pid:"):
                return max(0, int(line[4:]))
    return 0


def _wait_readable(descriptor: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
