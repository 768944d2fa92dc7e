"""How programs are started that must not outlive us."""

from __future__ import annotations

from pathlib import Path

from pytest_fcvm.host.process import find_tool

__all__ = ["ends_with_us"]


def ends_with_us() -> list[str | Path]:
    """Return what to put before a command line so that the kernel kills the program when the calling thread dies.

    `setpriv` (util-linux) executes the program in its own place, so its process id is the program's. Nothing is put
    there where it is missing.
    """
    setpriv = find_tool("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
