"""Facts about this host that figures depend on, and the CPU time and memory of a process."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from pathlib import Path

__all__ = ["cpu_ms_of", "host_facts", "private_kib_of"]

_PRIVATE = re.compile(r"^(Private_\w+|Anonymous):\s+(\d+) kB", re.MULTILINE)


def host_facts() -> dict[str, str | float]:
    """Return the CPU, its cores, the load average of the last minute, the kernel and Python version."""
    model = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def cpu_ms_of(pid: int) -> float:
    """Return the CPU time of a process's living threads in ms, from /proc/PID/task/*/schedstat (first field, ns).

    /proc/PID/stat counts in ticks of 10 ms, which is too coarse for a clone.
    """
    spent_ns = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            spent_ns += int((thread / "schedstat").read_text().split()[0])
    return spent_ns / 1e6


def private_kib_of(pid: int) -> tuple[int, int]:
    """Return a process's private memory and its anonymous memory, both in KiB.

    From /proc/PID/smaps_rollup (proc_pid_smaps(5)): Private_Clean + Private_Dirty, and Anonymous. Huge pages of
    hugetlbfs count as private too.
    """
    found = {name: int(kib) for name, kib in _PRIVATE.findall(Path(f"/proc/{pid}/smaps_rollup").read_text())}
    return sum(kib for name, kib in found.items() if name != "Anonymous"), found["Anonymous"]
