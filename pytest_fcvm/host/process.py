"""Find foreign programs, run them with a deadline, and report how they failed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pytest_fcvm.errors import HostError
from pytest_fcvm.host.bundled import find_bundled
from pytest_fcvm.host.limits import host_error, lacks_processes, process_limit_hint
from pytest_fcvm.host.own import environment, find_program, getpid, shutil, subprocess

__all__ = [
    "ToolFailed",
    "condense",
    "find_tool",
    "killed_at_deadline",
    "killed_with_us",
    "resolve_tool",
    "run_tool",
    "start_tool",
]

_UNLESS_ORPHANED = '[ "$PPID" = "$0" ] && exec "$@"'


class ToolFailed(HostError):
    """A program failed. `exit_code` is negative for a signal; `stderr` is the program's output."""

    exit_code: int = 0
    stderr: str = ""


def find_tool(name: str) -> Path | None:
    """Return the program's path or None. Search PATH, then the system's sbin directories, then our own wheels.

    A distribution's program comes first: the distribution sees to its security fixes.
    """
    found = find_program(name) or shutil.which(name, path="/usr/local/sbin:/usr/sbin:/sbin") or find_bundled(name)
    return Path(found) if found else None


def resolve_tool(name: str, *, package: str) -> Path:
    """Return the program's path. Raise HostError with the package to install."""
    found = find_tool(name)
    if found is None:
        raise HostError(f"{name} is not installed", hint=f"apt-get install {package}")
    return found


def killed_with_us() -> list[str | Path]:
    """Return the beginning of a command line that makes the kernel kill the program when the calling thread dies.

    `setpriv` (util-linux) and a shell execute the program in their own place, so its process id stays the same. The
    shell checks that this process is still the parent. Return nothing without `setpriv`.
    """
    setpriv = find_tool("setpriv")
    if setpriv is None:
        return []
    return [setpriv, "--pdeathsig", "KILL", "--", "/bin/sh", "-c", _UNLESS_ORPHANED, str(getpid())]


def run_tool(
    argv: Sequence[str | Path], *, timeout_s: float, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> str:
    """Run a program to its end and return its stdout. Raise ToolFailed, with its final output, also at the deadline."""
    with (
        start_tool(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd, env=env) as process,
        killed_at_deadline(process, timeout_s) as late,
    ):
        stdout, stderr = process.communicate()
    if late.is_set():
        raise ToolFailed(f"{argv[0]} did not end within {timeout_s:.0f} s")
    if process.returncode:
        raise _failure(str(argv[0]), process.returncode, stderr.decode("utf-8", "replace"))
    return stdout.decode("utf-8", "surrogateescape")


def start_tool(
    argv: Sequence[str | Path],
    *,
    stdout: IO[bytes] | int,
    stderr: IO[bytes] | int,
    stdin: int = subprocess.DEVNULL,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a program in `env`, else in the session's environment. Raise ToolFailed when it cannot be started."""
    command = [str(part) for part in argv]
    if subprocess.Popen.__module__ != "subprocess":
        raise ToolFailed(
            f"{command[0]} could not be started: subprocess.Popen was replaced before pytest began",
            hint="replace it in tests only, so that snapshots are built with the original",
        )
    try:
        return subprocess.Popen(
            command, stdin=stdin, stdout=stdout, stderr=stderr, cwd=cwd, env=dict(env or environment()), bufsize=0
        )
    except OSError as error:
        hint = host_error(command[0], error).hint
        raise ToolFailed(f"{command[0]} could not be started: {error.strerror or error}", hint=hint) from error


@contextmanager
def killed_at_deadline(process: subprocess.Popen[bytes], timeout_s: float) -> Iterator[threading.Event]:
    """Kill the process at the end of the block or at the deadline. Set the event at the deadline.

    A lock keeps the deadline, so that patched clocks do not change it.
    """
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(timeout_s, kill)
    timer.daemon = True
    try:
        timer.start()
        yield late
    finally:
        timer.cancel()
        process.kill()


def condense(text: str, limit: int = 300) -> str:
    """Return the last line that is not blank, at most `limit` characters of it, for a one-line message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][-limit:] if lines else "it printed nothing"


def _failure(program: str, code: int, stderr: str) -> ToolFailed:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    hint = process_limit_hint() if lacks_processes(stderr) else ""
    error = ToolFailed(f"{program} {how}: {condense(stderr)}", hint=hint, evidence={program: stderr[-4000:]})
    error.exit_code, error.stderr = code, stderr
    return error
