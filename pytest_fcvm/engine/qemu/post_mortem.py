"""Why a VM is dead, told from what it left: its exit, its console, its log."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from pytest_fcvm.engine.protocol import VmExit
from pytest_fcvm.engine.qemu.ports import explain_refused_rule
from pytest_fcvm.errors import EngineError, FcvmError

__all__ = ["explain_death", "read_tail", "tell_end"]

_TAIL_BYTES = 16384
_PANIC = re.compile(r"Kernel panic - not syncing: ([^\r\n]*)")
# Words with which QEMU ends when the device state is not of this machine, this version or this memory.
_BAD_STATE = re.compile(r"load of migration failed|Not a migration stream|Unsupported migration stream|Size mismatch")


def explain_death(name: str, how: VmExit | None, *, console: Path, log: Path) -> FcvmError:
    """Return the error of whoever needed a VM that has ended; `how` is None when its end was not seen."""
    console_tail, log_tail = read_tail(console), read_tail(log)
    evidence = {"console": console_tail, "VMM log": log_tail}
    if how is not None and how.killed_by_us:
        return EngineError(f"VM {name} was killed", evidence=evidence)
    refused = explain_refused_rule(log_tail) if how is not None and how.code else None
    if refused is not None:
        return refused.with_evidence(**{"VMM log": log_tail})
    message, hint = _tell(how, console_tail, log_tail)
    return EngineError(f"VM {name} ended: {message}", hint=hint, evidence=evidence)


def read_tail(path: Path) -> str:
    """Return the end of a text file, "" when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def tell_end(code: int | None, signal_number: int | None, log: str) -> str:
    """Say in one line how QEMU ended, with its own last words."""
    # What failed is said before the assertion that ends it.
    words = _last_line(log, preferred=" error: " if signal_number == signal.SIGABRT else "")
    if signal_number == signal.SIGKILL:
        return "somebody killed QEMU (SIGKILL)"
    if signal_number is not None:
        how = f"QEMU was killed by {_signal_name(signal_number)}"
    else:
        how = f"QEMU exited with {code}"
    return f"{how}: {words}" if words else how


def _tell(how: VmExit | None, console: str, log: str) -> tuple[str, str]:
    if how is None:
        return _last_line(log) or "its monitor closed", ""
    panic = _PANIC.search(console)
    if panic is not None and how.signal is None:
        return f"the guest's kernel panicked: {panic[1].strip()}", ""
    if how.code == 0:
        return "the guest shut down or reset itself", ""
    return tell_end(how.code, how.signal, log), _hint(how, log)


def _hint(how: VmExit, log: str) -> str:
    if how.signal == signal.SIGKILL:
        return "was the host short of memory? dmesg | grep -i 'killed process'"
    if how.signal == signal.SIGBUS:
        return "its memory file could not grow: free space on the disk of --fcvm-cache-dir"
    return "build the snapshot again: --fcvm-rebuild" if _BAD_STATE.search(log) else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_line(log: str, preferred: str = "") -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    chosen = [line for line in lines if preferred in line] or lines
    return chosen[-1].removeprefix("qemu-system-x86_64: ")[-500:] if chosen else ""
