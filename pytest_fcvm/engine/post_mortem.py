"""Why a VM is dead, from its exit, its console and its log."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path

from pytest_fcvm.engine.protocol import VmExit
from pytest_fcvm.errors import EngineError, FcvmError
from pytest_fcvm.host.files import read_tail
from pytest_fcvm.host.limits import lacks_processes, process_limit_hint

__all__ = ["ExitPatterns", "describe_exit", "explain_death", "read_evidence", "without_expected"]

_NO_PCI = re.compile(r"^(?:\[ *[\d.]+\] )?PCI: Fatal: No config space access function found\r*(?:\n|\Z)", re.MULTILINE)
_PANIC = re.compile(r"Kernel panic - not syncing: ([^\r\n]*)")


@dataclass(frozen=True, kw_only=True)
class ExitPatterns:
    """How to read what a VMM prints before it ends.

    `prefix` matches the start of its lines. `abort_mark` is in the line that says why it aborted. `bad_state` matches
    its message for a device state of another machine type, another version or other memory.
    """

    vmm: str
    prefix: re.Pattern[str]
    bad_state: re.Pattern[str]
    abort_mark: str = ""


def explain_death(patterns: ExitPatterns, name: str, how: VmExit | None, *, console: Path, log: Path) -> FcvmError:
    """Return the error for a VM that has ended; `how` is None when its end was not seen."""
    evidence = read_evidence(console, log)
    if how is not None and how.killed_by_us:
        return EngineError(f"VM {name} was killed", evidence=evidence)
    message, hint = _describe_death(patterns, how, evidence["console"], evidence["VMM log"])
    return EngineError(f"VM {name} ended: {message}", hint=hint, evidence=evidence)


def read_evidence(console: Path, log: Path) -> dict[str, str]:
    """Return the ends of a VM's console and log, as an error's evidence."""
    return {"console": without_expected(read_tail(console)), "VMM log": read_tail(log)}


def without_expected(console: str) -> str:
    """Remove the line that every kernel prints without PCI: it looks like a fault and is none."""
    return _NO_PCI.sub("", console)


def describe_exit(patterns: ExitPatterns, code: int | None, signal_number: int | None, log: str) -> str:
    """Say in one line how a VMM ended, with the final line of its log."""
    # The line that says what failed comes before the assertion that ends the VMM.
    words = _last_line(patterns, log, preferred=patterns.abort_mark if signal_number == signal.SIGABRT else "")
    if signal_number == signal.SIGKILL:
        return f"somebody killed {patterns.vmm} (SIGKILL)"
    if signal_number is not None:
        how = f"{patterns.vmm} was killed by {_signal_name(signal_number)}"
    else:
        how = f"{patterns.vmm} exited with {code}"
    return f"{how}: {words}" if words else how


def _describe_death(patterns: ExitPatterns, how: VmExit | None, console: str, log: str) -> tuple[str, str]:
    if how is None:
        return _last_line(patterns, log) or "its monitor closed", ""
    panic = _PANIC.search(console)
    if panic is not None and how.signal is None:
        return f"the guest's kernel panicked: {panic[1].strip()}", ""
    if how.code == 0:
        return "the guest shut down or reset itself", ""
    return describe_exit(patterns, how.code, how.signal, log), _hint(patterns, how, log)


def _hint(patterns: ExitPatterns, how: VmExit, log: str) -> str:
    if lacks_processes(log):
        return process_limit_hint()
    if how.signal == signal.SIGKILL:
        return "was the host short of memory? dmesg | grep -i 'killed process'"
    if how.signal == signal.SIGBUS:
        return "its memory file could not grow: free space on the disk of --fcvm-cache-dir"
    return "build the snapshot again: --fcvm-rebuild" if patterns.bad_state.search(log) else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_line(patterns: ExitPatterns, log: str, preferred: str = "") -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    chosen = [line for line in lines if preferred in line] or lines
    return patterns.prefix.sub("", chosen[-1])[-500:] if chosen else ""
