"""Why a QEMU is dead."""

from __future__ import annotations

import re
from pathlib import Path

from pytest_fcvm.engine import post_mortem
from pytest_fcvm.engine.post_mortem import ExitPatterns
from pytest_fcvm.engine.protocol import VmExit
from pytest_fcvm.errors import FcvmError

__all__ = ["describe_exit", "explain_death"]

_PATTERNS = ExitPatterns(
    vmm="QEMU",
    prefix=re.compile(r"^qemu-system-x86_64: "),
    bad_state=re.compile(r"load of migration failed|Not a migration stream|Unsupported migration stream|Size mismatch"),
    abort_mark=" error: ",
)


def explain_death(name: str, how: VmExit | None, *, console: Path, log: Path) -> FcvmError:
    """Return the error for a VM that has ended; `how` is None when its end was not seen."""
    return post_mortem.explain_death(_PATTERNS, name, how, console=console, log=log)


def describe_exit(code: int | None, signal_number: int | None, log: str) -> str:
    """Say in one line how QEMU ended, with the final line of its log."""
    return post_mortem.describe_exit(_PATTERNS, code, signal_number, log)
