"""The result of a command in the guest, and the phases of a clone's start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["ExecResult", "Progress", "Timeline"]

Progress = Callable[[str], object]
"""Shows one line of progress to the user."""


@dataclass(frozen=True, kw_only=True)
class ExecResult:
    """The result of a command. `stdout` and `stderr` are decoded as UTF-8 with surrogateescape.

    `exit_code` is 128 + signal for a killed command, 127 for a missing program, 126 for a program that cannot run.
    """

    exit_code: int
    stdout_bytes: bytes = b""
    stderr_bytes: bytes = b""
    duration_s: float = 0.0

    @property
    def stdout(self) -> str:
        """Return standard output as text."""
        return self.stdout_bytes.decode("utf-8", "surrogateescape")

    @property
    def stderr(self) -> str:
        """Return standard error as text."""
        return self.stderr_bytes.decode("utf-8", "surrogateescape")


@dataclass
class Timeline:
    """The phases of a clone's start: name and end of each, in seconds since `start` on the monotonic clock."""

    start: float
    phases: list[tuple[str, float]] = field(default_factory=list)

    def mark(self, phase: str, now: float) -> None:
        """Record that a phase ended at `now` on the monotonic clock."""
        self.phases.append((phase, now - self.start))

    def __str__(self) -> str:
        parts, before = [], 0.0
        for phase, end in self.phases:
            parts.append(f"{phase} {(end - before) * 1000:.1f} ms")
            before = end
        return ", ".join(parts)
