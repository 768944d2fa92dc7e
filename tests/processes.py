"""Processes of this host, by their ids."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["children", "command", "descendants"]


def command(pid: int) -> str:
    """Return the command line of a process, "" when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def children(pid: int) -> list[int]:
    """Return the processes whose parent is `pid`."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def descendants(pid: int) -> list[int]:
    """Return the children of a process, their children, and so on."""
    return [one for child in children(pid) for one in (child, *descendants(child))]
