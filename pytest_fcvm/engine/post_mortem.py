"""Why a VM is dead, told from what it left: its exit, its console, its log."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path

from pytest_fcvm.engine.protocol import VmExit
from pytest_fcvm.errors import EngineError, FcvmError
from pytest_fcvm.host.files import open_regular
from pytest_fcvm.host.limits import lacks_process, more_processes

__all__ = ["Speech", "describe_exit", "explain_death", "read_tail", "without_expected"]

_TAIL_BYTES = 16384
_NO_PCI = re.compile(r"^(?:\[ *[\d.]+\] )?PCI: Fatal: No config space access function found\r*(?:\n|\Z)", re.MULTILINE)
_PANIC = re.compile(r"Kernel panic - not syncing: ([^\r\n]*)")


@dataclass(frozen=True, kw_only=True)
class Speech:
    """How a VMM talks of its own end.

    `prefix` starts its lines, `abort_mark` is in the line that says why it aborted, `bad_state` finds the words with
    which it ends when the device state is not of this machine, this version or this memory.
    """

    vmm: str
    prefix: re.Pattern[str]
    bad_state: re.Pattern[str]
    abort_mark: str = ""


def explain_death(speech: Speech, name: str, how: VmExit | None, *, console: Path, log: Path) -> FcvmError:
    """Return the error of whoever needed a VM that has ended; `how` is None when its end was not seen."""
    console_tail, log_tail = read_tail(console), read_tail(log)
    evidence = {"console": console_tail, "VMM log": log_tail}
    if how is not None and how.killed_by_us:
        return EngineError(f"VM {name} was killed", evidence=evidence)
    message, hint = _tell(speech, how, console_tail, log_tail)
    return EngineError(f"VM {name} ended: {message}", hint=hint, evidence=evidence)


def read_tail(path: Path) -> str:
    """Return the end of a text file, "" when there is none, or a link in its place."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            return without_expected(file.read().decode("utf-8", "replace"))
    except OSError:
        return ""


def without_expected(console: str) -> str:
    """Leave out what every kernel says on a machine without PCI: no fault, and the first that a person would see."""
    return _NO_PCI.sub("", console)


def describe_exit(speech: Speech, code: int | None, signal_number: int | None, log: str) -> str:
    """Say in one line how a VMM ended, with its own last words."""
    # What failed is said before the assertion that ends it.
    words = _last_line(speech, log, preferred=speech.abort_mark if signal_number == signal.SIGABRT else "")
    if signal_number == signal.SIGKILL:
        return f"somebody killed {speech.vmm} (SIGKILL)"
    if signal_number is not None:
        how = f"{speech.vmm} was killed by {_signal_name(signal_number)}"
    else:
        how = f"{speech.vmm} exited with {code}"
    return f"{how}: {words}" if words else how


def _tell(speech: Speech, how: VmExit | None, console: str, log: str) -> tuple[str, str]:
    if how is None:
        return _last_line(speech, log) or "its monitor closed", ""
    panic = _PANIC.search(console)
    if panic is not None and how.signal is None:
        return f"the guest's kernel panicked: {panic[1].strip()}", ""
    if how.code == 0:
        return "the guest shut down or reset itself", ""
    return describe_exit(speech, how.code, how.signal, log), _hint(speech, how, log)


def _hint(speech: Speech, how: VmExit, log: str) -> str:
    if lacks_process(log):
        return more_processes()
    if how.signal == signal.SIGKILL:
        return "was the host short of memory? dmesg | grep -i 'killed process'"
    if how.signal == signal.SIGBUS:
        return "its memory file could not grow: free space on the disk of --fcvm-cache-dir"
    return "build the snapshot again: --fcvm-rebuild" if speech.bad_state.search(log) else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_line(speech: Speech, log: str, preferred: str = "") -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    chosen = [line for line in lines if preferred in line] or lines
    return speech.prefix.sub("", chosen[-1])[-500:] if chosen else ""
