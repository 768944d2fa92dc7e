"""Commands in the guest: what one gets, how it is spelt, and what a test gets of one that has ended."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pytest_fcvm.errors import CommandFailed, GuestError, UsageProblem
from pytest_fcvm.host.own import os
from pytest_fcvm.model.guest import ExitStatus, ProcessSpec, memory_advice
from pytest_fcvm.model.results import ExecResult

__all__ = ["SHELL", "Command", "ExecDefaults", "command_failed", "exec_result", "spell"]

Command = str | Sequence[str]

SHELL = ("/bin/sh", "-c")


@dataclass(frozen=True, kw_only=True)
class ExecDefaults:
    """What a command in the guest gets by default: environment, directory and user of image and spec.

    `stop_signal` is what the image wants to be stopped by.
    """

    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/"
    user: str = ""
    stop_signal: int = signal.SIGTERM

    def process(self, cmd: Command, env: Mapping[str, str], cwd: str | None, user: str | None) -> ProcessSpec:
        """Return a command to run: a list is argv, a string goes to the image's shell. Raise UsageProblem."""
        argv = (*SHELL, cmd) if isinstance(cmd, str) else tuple(cmd)
        if not argv or not all(isinstance(word, str) for word in argv):
            raise UsageProblem(f"{cmd!r} is not a command", hint="pass a string, or a list of strings")
        return ProcessSpec(
            argv=argv,
            env={**self.env, **env},
            cwd=cwd or self.cwd,
            user=self.user if user is None else user,
        )


def exec_result(cmd: Command, stdout: bytes, stderr: bytes, status: ExitStatus, duration_s: float) -> ExecResult:
    """Return a command's result as a test gets it. Raise GuestError for an image without a shell."""
    if status.message.startswith(f"exec {SHELL[0]}:") and isinstance(cmd, str):
        raise GuestError(f"the image has no shell to run {spell(cmd)}: {status.message}", hint="pass a list of words")
    if status.message:
        stderr += f"fcvm: {status.message}\n".encode()
    if status.oom_kills:
        stderr += f"fcvm: {memory_advice(status.oom_kills)}\n".encode()
    return ExecResult(exit_code=status.exit_code, stdout_bytes=stdout, stderr_bytes=stderr, duration_s=duration_s)


def command_failed(cmd: Command, result: ExecResult, how: str) -> CommandFailed:
    """Return the error of a command that ended in another way than it was to, with what it printed."""
    evidence = {"stdout": result.stdout[-8000:], "stderr": result.stderr[-8000:]}
    last = (result.stderr or result.stdout).strip().splitlines()[-1:] or ["it printed nothing"]
    return CommandFailed(f"{spell(cmd)} {how} (exit code {result.exit_code}): {last[0]}", evidence=evidence)


def spell(cmd: Command) -> str:
    """Return a command as a person writes it."""
    return cmd if isinstance(cmd, str) else shlex.join(os.fspath(word) for word in cmd)
