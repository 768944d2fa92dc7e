"""What differs between the QEMU versions that we know: 7.2 to 11."""

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
        """Say whether `file:` is a migration address. `fd:` to a plain file was deprecated by 9.1, removed by 11.0."""
        return self >= (8, 2)

    @property
    def opens_private_memory_read_only(self) -> bool:
        """Say whether `readonly=on,rom=off` exists; older versions open a private memory file for writing too."""
        return self >= (8, 2)


OLDEST = QemuVersion(7, 2)
"""The first version with `-netdev dgram`, on which all of this was established."""


def parse_version(text: str) -> QemuVersion | None:
    """Read the output of `qemu-system-x86_64 --version`."""
    match = _VERSION.search(text)
    return QemuVersion(int(match[1]), int(match[2]), int(match[3] or 0)) if match else None
