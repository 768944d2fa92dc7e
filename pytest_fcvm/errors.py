"""The errors, sorted by who must act.

FcvmError
├── UsageProblem   the person who wrote the command, the marker or the test
│   └── UnresolvedSetting   a setting names what does not exist here (yet)
├── HostError      the administrator of the host: KVM, privileges, disk, memory, a missing tool
│   └── EngineUnavailable   no engine works on this host
├── ImageError     the owner of the OCI image or its registry
├── EngineError    the maintainer of pytest-fcvm or of the VMM (QEMU, Firecracker)
└── GuestError     the author of the test or of the image: the agent or the workload failed
    ├── WorkloadExited   the image's own program ended
    ├── GuestTimeout     a deadline passed (also a TimeoutError)
    └── CommandFailed    `succeed`, `fail` or `check=True` was not met

Every error has a `message` (the cause, one line), a `hint` (what to change) and `evidence` (the ends of the console,
of the workload log and of the VMM log). Every error survives pickling, so that xdist workers can pass it on.
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
    """Say what failed, how to fix it, and what was seen. The subclass says who must act.

    `evidence` maps a section's title ("console", "workload log") to its text, which is untrusted and not escaped.
    """

    def __init__(self, message: str, *, hint: str = "", evidence: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.evidence = dict(evidence or {})
        self.clone = ""  # the name of the clone that the evidence is of, if known

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.hint, self.evidence, self.__dict__)

    def with_evidence(self, **sections: str) -> FcvmError:
        """Add the sections that `evidence` lacks, and return the error itself."""
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
    """An option, a marker argument or a call is wrong: the person who wrote it must change it.

    The plugin turns it into `pytest.UsageError`; the command exits with 2.
    """


class UnresolvedSetting(UsageProblem):
    """A valid setting names a variable, a file or a home directory that does not exist here, or not yet.

    The person who runs the tests must create it, or change the setting.
    """


class HostError(FcvmError):
    """The host lacks something: its administrator must add a device, privilege, tool, disk, memory or descriptor."""


class EngineUnavailable(HostError):
    """No engine works on this host: its administrator must fix one of the reasons in the message, one per engine."""


class ImageError(FcvmError):
    """The image is unavailable or invalid: its owner, or the person who named it, must act."""


class EngineError(FcvmError):
    """The VMM refused a request, died or broke its protocol: the maintainer of pytest-fcvm or of the VMM must act."""


class GuestError(FcvmError):
    """The agent or the workload in the VM failed: the author of the test or of the image must act."""


class WorkloadExited(GuestError):
    """The image's own program ended too early: the author of the image, or of its settings, must act."""


class GuestTimeout(GuestError, TimeoutError):
    """A wait on the guest reached its deadline: give it more time, or fix what is slow in the guest."""


class CommandFailed(GuestError):
    """A command in the guest did not end as the test demands: the author of the test or of the command must act."""
