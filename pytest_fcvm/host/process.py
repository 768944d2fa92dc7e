"""Foreign programs: found, run with a deadline, their failures told apart."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from pytest_fcvm.errors import HostError
from pytest_fcvm.host.limits import host_error, lacks_process, more_processes
from pytest_fcvm.host.own import getpid

__all__ = ["ToolFailed", "condense", "ends_with_us", "find_tool", "resolve_tool", "run_tool"]

_UNLESS_ORPHANED = '[ "$PPID" = "$0" ] && exec "$@"'


class ToolFailed(HostError):
    """A program ended with a failure; `exit_code` is negative for a signal, `stderr` what it said."""

    exit_code: int = 0
    stderr: str = ""


def find_tool(name: str) -> Path | None:
    """Return the program's path or None, looking in the system's own sbin folders as well."""
    found = shutil.which(name) or shutil.which(name, path="/usr/local/sbin:/usr/sbin:/sbin")
    return Path(found) if found else None


def resolve_tool(name: str, *, package: str) -> Path:
    """Return the program's path. Raise HostError that names the package to install."""
    found = find_tool(name)
    if found is None:
        raise HostError(f"{name} is not installed", hint=f"apt-get install {package}")
    return found


def ends_with_us() -> list[str | Path]:
    """Return what to put before a command line so that the kernel kills the program when the calling thread dies.

    `setpriv` (util-linux) executes the program in its own place, so its process id is the program's; a shell between
    them does not begin for a process that died before the kernel was told. Nothing is put there without `setpriv`.
    """
    setpriv = find_tool("setpriv")
    if setpriv is None:
        return []
    return [setpriv, "--pdeathsig", "KILL", "--", "/bin/sh", "-c", _UNLESS_ORPHANED, str(getpid())]


def run_tool(
    argv: Sequence[str | Path], *, timeout_s: float, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> str:
    """Run a program to its end and return its stdout. Raise ToolFailed with its last words, also at the deadline."""
    command = [str(part) for part in argv]
    try:
        done = subprocess.run(
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ToolFailed(f"{command[0]} did not end within {timeout_s:.0f} s") from error
    except OSError as error:
        hint = host_error(command[0], error).hint
        raise ToolFailed(f"{command[0]} could not be started: {error.strerror}", hint=hint) from error
    if done.returncode:
        raise _failure(command[0], done.returncode, done.stderr.decode("utf-8", "replace"))
    return done.stdout.decode("utf-8", "surrogateescape")


def condense(text: str, limit: int = 300) -> str:
    """Return the last line that says something, cut to `limit` characters, for a one-line message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][-limit:] if lines else "it said nothing"


def _failure(program: str, code: int, stderr: str) -> ToolFailed:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    hint = more_processes() if lacks_process(stderr) else ""
    error = ToolFailed(f"{program} {how}: {condense(stderr)}", hint=hint, evidence={program: stderr[-4000:]})
    error.exit_code, error.stderr = code, stderr
    return error
