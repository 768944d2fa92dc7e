"""Commands in the guest: how one is spelt, and what a test gets of one that has ended."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

from pytest_fcvm.errors import CommandFailed, GuestError
from pytest_fcvm.model.guest import ExitStatus
from pytest_fcvm.model.results import ExecResult

__all__ = ["SHELL", "Command", "command_failed", "exec_result", "spell"]

Command = str | Sequence[str]

SHELL = ("/bin/sh", "-c")


def exec_result(cmd: Command, stdout: bytes, stderr: bytes, status: ExitStatus, duration_s: float) -> ExecResult:
    """Return a command's result as a test gets it. Raise GuestError for an image without a shell."""
    if status.message.startswith(f"exec {SHELL[0]}:") and isinstance(cmd, str):
        raise GuestError(f"the image has no shell to run {spell(cmd)}: {status.message}", hint="pass a list of words")
    if status.message:
        stderr += f"fcvm: {status.message}\n".encode()
    code = status.code if status.code is not None else 128 + (status.signal or 0)
    return ExecResult(exit_code=code, stdout_bytes=stdout, stderr_bytes=stderr, duration_s=duration_s)


def command_failed(cmd: Command, result: ExecResult, how: str) -> CommandFailed:
    """Return the error of a command that ended in another way than it was to, with what it printed."""
    evidence = {"stdout": result.stdout[-8000:], "stderr": result.stderr[-8000:]}
    last = (result.stderr or result.stdout).strip().splitlines()[-1:] or ["it printed nothing"]
    return CommandFailed(f"{spell(cmd)} {how} (exit code {result.exit_code}): {last[0]}", evidence=evidence)


def spell(cmd: Command) -> str:
    """Return a command as a person writes it."""
    return cmd if isinstance(cmd, str) else shlex.join(os.fspath(word) for word in cmd)
