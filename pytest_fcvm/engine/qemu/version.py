"""What differs between QEMU 7.2 and 11."""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["OLDEST", "QemuVersion", "parse_version"]

_VERSION = re.compile(r"QEMU emulator version (\d+)\.(\d+)(?:\.(\d+))?")


class QemuVersion(NamedTuple):
    """A version of QEMU and what it can do."""

    major: int
    minor: int
    micro: int = 0

    def __str__(self) -> str:
        return ".".join(map(str, self))

    @property
    def takes_state_by_path(self) -> bool:
        """Say whether `file:` is a migration address. 9.1 deprecated `fd:` to a plain file, and 11.0 removed it."""
        return self >= (8, 2)

    @property
    def opens_private_memory_read_only(self) -> bool:
        """Say whether `readonly=on,rom=off` exists. Older versions open a private memory file for writing too."""
        return self >= (8, 2)


OLDEST = QemuVersion(7, 2)
"""The first version with `-netdev dgram`, and the oldest that the engine was tried with."""


def parse_version(text: str) -> QemuVersion | None:
    """Read the output of `qemu-system-x86_64 --version`."""
    match = _VERSION.search(text)
    return QemuVersion(int(match[1]), int(match[2]), int(match[3] or 0)) if match else None
