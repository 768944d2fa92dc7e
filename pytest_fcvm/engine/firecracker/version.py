"""What differs between Firecracker versions, and which versions are refused."""

from __future__ import annotations

import re
from typing import NamedTuple

from pytest_fcvm.errors import HostError

__all__ = ["FirecrackerVersion", "parse_version", "refuse_broken"]

_VERSION = re.compile(r"\bv?(\d+)\.(\d+)\.(\d+)")
_HINT = "install Firecracker 1.16.1 or newer: fcvm setup firecracker"


class FirecrackerVersion(NamedTuple):
    """A version of Firecracker and what it can do."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return ".".join(map(str, self))

    @property
    def vsock_hangs_after_resume(self) -> bool:
        """Say whether vsock hangs for ever after a bare pause and resume (issue 6074, fixed after 1.16.1)."""
        return (1, 16, 0) <= self <= (1, 16, 1)


def parse_version(text: str) -> FirecrackerVersion | None:
    """Read the output of `firecracker --version`, or the answer to GET /version."""
    match = _VERSION.search(text)
    return FirecrackerVersion(int(match[1]), int(match[2]), int(match[3])) if match else None


def refuse_broken(version: FirecrackerVersion) -> None:
    """Raise HostError, with the reason, for a version whose clones are not reliable."""
    reason = _find_fault(version)
    if reason:
        raise HostError(f"Firecracker {version} is not used: {reason}", hint=_HINT)


def _find_fault(version: FirecrackerVersion) -> str:
    if version < (1, 14, 4):
        return "restored guests lose vsock connections, and a console file per clone needs 1.14"
    if (1, 15, 0) <= version < (1, 15, 1):
        return "the monotonic time of its clones may jump (issue 5809)"
    if (1, 16, 0) <= version < (1, 16, 1):
        return "vsock may hang for ever in its restored guests (issue 5969)"
    return ""
