"""What starts processes for an engine, as Protocols. `supervisor.py` implements them."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pytest_fcvm.host.limits import translating_emfile
from pytest_fcvm.host.own import shutil
from pytest_fcvm.host.sockets import socket_pair
from pytest_fcvm.host.supervisor import messages

__all__ = ["Child", "ChildExit", "Program", "Spawner", "start_program"]


class ChildExit(Protocol):
    """How a process ended: by `code` or `signal`; the other is None."""

    @property
    def code(self) -> int | None:
        """Return the exit code."""
        ...

    @property
    def signal(self) -> int | None:
        """Return the number of the signal that ended it."""
        ...


class Child(Protocol):
    """A process that ends when this process ends, however that happens."""

    @property
    def pid(self) -> int:
        """Return its process id."""
        ...

    def kill(self) -> None:
        """Send SIGKILL and return at once. Idempotent."""
        ...

    def send_signal(self, number: int) -> None:
        """Send a signal to this process. Do nothing when it has ended."""
        ...

    def wait(self, timeout_s: float) -> ChildExit:
        """Wait until the process has ended. Raise HostError at the deadline."""
        ...

    def on_exit(self, callback: Callable[[ChildExit], None]) -> None:
        """Call back once when the process has ended, at once if it already has."""
        ...

    def forget_callbacks(self) -> None:
        """Drop the callbacks of `on_exit` that were not called yet."""
        ...


class Spawner(Protocol):
    """Starts processes that end when this process ends."""

    def make_dir(self, name: str) -> Path:
        """Create a private directory (mode 0700) for one child."""
        ...

    def spawn(
        self,
        argv: Sequence[str],
        *,
        name: str,
        fds: Mapping[int, int],
        stdout: Path,
        cwd: Path | None,
        env: Mapping[str, str] | None,
        owned_dir: Path | None,
    ) -> Child:
        """Start a process. `fds` maps its descriptor numbers to ours; `stdout` also receives stderr."""
        ...


@dataclass(frozen=True, kw_only=True)
class Program:
    """A running helper program, our end of its control socket, and the file with its output, which ends with it."""

    child: Child
    control: socket.socket
    log: Path

    def close(self) -> None:
        """Kill the program. Idempotent."""
        self.child.kill()
        self.control.close()


def start_program(spawner: Spawner, name: str, script: Path, *arguments: str) -> Program:
    """Run one of our Python files without `site`, in a new directory that is removed after its end.

    The control socket has sequenced packets. It is `messages.CONTROL` in the program. Raise HostError; nothing is left
    then.
    """
    with translating_emfile(name), ExitStack() as undo:
        directory = spawner.make_dir(name)
        undo.callback(shutil.rmtree, directory, ignore_errors=True)
        control, theirs = socket_pair(socket.SOCK_SEQPACKET)
        undo.callback(control.close)
        log = directory / f"{script.stem}.log"
        with theirs:
            child = spawner.spawn(
                [sys.executable, "-I", "-S", str(script), *arguments],
                name=directory.name,
                fds={messages.CONTROL: theirs.fileno()},
                stdout=log,
                cwd=directory,
                env=None,
                owned_dir=directory,
            )
        undo.pop_all()
    return Program(child=child, control=control, log=log)
