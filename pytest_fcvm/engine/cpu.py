"""Which CPU the host has: a snapshot depends on it."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["CpuIdentity", "read_cpu"]


class CpuIdentity:
    """The host's CPU, as /proc/cpuinfo describes it."""

    def __init__(self, text: str) -> None:
        self.model = _field(text, "model name") or "unknown"
        self.microcode = _field(text, "microcode") or "unknown"
        self.mhz = float(_field(text, "cpu MHz") or 0)
        self.flags = frozenset(_field(text, "flags").split())


def read_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> CpuIdentity:
    """Read the first CPU's identity."""
    with cpuinfo.open() as file:
        return CpuIdentity(file.read(4096))


def _field(text: str, name: str) -> str:
    match = re.search(rf"^{re.escape(name)}\s*:\s*(.*)$", text, re.MULTILINE)
    return match[1].strip() if match else ""
