"""What can go wrong, by who must act.

FcvmError
├── UsageProblem   the person who wrote the command, the marker or the test
│   └── UnresolvedSetting   a setting names what is not here (yet)
├── HostError      the machine: KVM, rights, disk, memory, a missing tool
│   └── EngineUnavailable   no engine works here
├── ImageError     the OCI image or its registry
├── EngineError    the VMM (QEMU, Firecracker)
└── GuestError     the agent or the workload inside the VM
    ├── WorkloadExited   the image's own program ended
    ├── GuestTimeout     a deadline passed
    └── CommandFailed    `succeed`, `fail` or `check=True` was not met

Every error carries a `message` (the cause, one line), a `hint` (what to change) and `evidence`
(named tails: console, workload log, VMM log). All of them survive pickling, so that xdist workers can hand them on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "CommandFailed",
    "EngineError",
    "EngineUnavailable",
    "FcvmError",
    "GuestError",
    "GuestTimeout",
    "HostError",
    "ImageError",
    "UnresolvedSetting",
    "UsageProblem",
    "WorkloadExited",
]


class FcvmError(Exception):
    """Say what failed, how to mend it, and what was seen.

    `evidence` maps a section's title ("console", "workload log") to its text, untrusted and unescaped.
    """

    def __init__(self, message: str, *, hint: str = "", evidence: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.evidence = dict(evidence or {})
        self.clone = ""  # whose evidence it is, where that is known

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.hint, self.evidence, self.__dict__)

    def with_evidence(self, **sections: str) -> FcvmError:
        """Add sections that are not there yet and return the error itself."""
        for title, text in sections.items():
            self.evidence.setdefault(title.replace("_", " "), text)
        return self


def _rebuild(
    cls: type[FcvmError], message: str, hint: str, evidence: dict[str, str], state: dict[str, Any]
) -> FcvmError:
    error = cls(message, hint=hint, evidence=evidence)
    error.__dict__.update(state)
    return error


class UsageProblem(FcvmError):
    """A wrong option, marker argument or call; becomes `pytest.UsageError` in the plugin, exit 2 in the command."""


class UnresolvedSetting(UsageProblem):
    """A sound setting that names what is not here, or not yet: a variable, a file, a home directory."""


class HostError(FcvmError):
    """This machine lacks something: a device, a right, a tool, disk, memory, file descriptors."""


class EngineUnavailable(HostError):
    """No engine works on this machine; the message has every engine's reason."""


class ImageError(FcvmError):
    """The image cannot be had or is not sound."""


class EngineError(FcvmError):
    """The VMM refused, died or answered what it must not."""


class GuestError(FcvmError):
    """The agent or the workload in the VM failed."""


class WorkloadExited(GuestError):
    """The image's own program ended while it was needed."""


class GuestTimeout(GuestError):
    """A wait on the guest reached its deadline."""


class CommandFailed(GuestError):
    """A command in the guest did not end as the test demanded."""
