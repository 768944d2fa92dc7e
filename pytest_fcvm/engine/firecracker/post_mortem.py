"""Why a Firecracker is dead. It ends in the same way after a guest's panic and after a reboot; the console differs."""

from __future__ import annotations

import re
from pathlib import Path

from pytest_fcvm.engine import post_mortem
from pytest_fcvm.engine.post_mortem import ExitPatterns
from pytest_fcvm.engine.protocol import VmExit
from pytest_fcvm.errors import EngineError, FcvmError

__all__ = ["explain_death"]

_PATTERNS = ExitPatterns(
    vmm="Firecracker",
    prefix=re.compile(r"^\S+ \[[^\]]*\] (?:\[[^\]]*\] )?"),  # "2026-11-27T10:00:00.000000000 [name:main] "
    bad_state=re.compile(r"Failed to restore|Loading snapshot failed|BuildMicroVmError\(Restore"),
)
# FcExitCode in src/vmm/src/lib.rs
_CODES = {
    148: ("a system call that its seccomp filter forbids", "report this to the Firecracker project"),
    149: ("SIGBUS: its memory file was cut short, or its disk is full", "free space on the disk of --fcvm-cache-dir"),
    150: ("SIGSEGV", "report this to the Firecracker project"),
    152: ("a configuration that it does not accept", ""),
    153: ("arguments that it does not accept", "use another Firecracker: --fcvm-firecracker PATH"),
}


def explain_death(name: str, how: VmExit | None, *, console: Path, log: Path) -> FcvmError:
    """Return the error for a VM that has ended; `how` is None when its end was not seen."""
    error = post_mortem.explain_death(_PATTERNS, name, how, console=console, log=log)
    if how is not None and how.code in _CODES:
        reason, hint = _CODES[how.code]
        return EngineError(f"{error.message} ({reason})", hint=hint or error.hint, evidence=error.evidence)
    return error
