"""The rate of this host's time stamp counter (TSC), which is also the rate of a guest's TSC under TCG.

The guest's kernel gets the rate by `tsc_early_khz`, and the rate is part of a snapshot's key. It is measured once per
boot of the host. A new value that differs by jitter alone does not replace the old one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pytest_fcvm.engine.cpu import CpuIdentity
from pytest_fcvm.errors import HostError
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.host.own import CLOCK_MONOTONIC_RAW, clock_gettime_ns
from pytest_fcvm.host.records import boot_id, open_record

__all__ = ["measure_tsc_khz", "stable_tsc_khz"]

_RDTSC = b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0\xc3"  # rdtsc; shl rdx, 32; or rax, rdx; ret
_WINDOW_S = 0.05
_JITTER = 0.001


def stable_tsc_khz(record_file: Path, cpu: CpuIdentity, measure: Callable[[], int] | None = None) -> int:
    """Return the TSC's rate in kHz, the same number in every process and after every boot of this host.

    Raise HostError when the rate can be neither measured nor read.
    """
    name, boot = f"{cpu.model} | {cpu.microcode}", boot_id()
    with open_record(record_file) as record:
        khz, measured_in = _known(record.get(name))
        if khz and measured_in == boot:
            return khz
        now = (measure or measure_tsc_khz)() or round(cpu.mhz * 1000)
        if now <= 0:
            raise HostError("the rate of this CPU's time stamp counter is unknown", hint="use --fcvm-accel kvm")
        if not khz or abs(now - khz) > khz * _JITTER:
            khz = now
        record[name] = {"khz": khz, "boot": boot}
        return khz


def measure_tsc_khz() -> int:
    """Count for 50 ms and return the rate. Return 0 where memory may not be executable (hardened hosts)."""
    import ctypes  # imported here: needed once per boot of the host, and slow to import
    import mmap

    try:
        with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
            page.write(_RDTSC)
            anchor = ctypes.c_char.from_buffer(page)
            try:
                return _count(ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(anchor)))
            finally:
                del anchor  # the map cannot be closed while a buffer points into it
    except OSError:
        return 0


def _count(read_counter: Callable[[], int]) -> int:
    ticks, nanoseconds = _sample(read_counter)
    wait_until(lambda: False, Deadline(_WINDOW_S))
    later_ticks, later = _sample(read_counter)
    return round((later_ticks - ticks) * 1_000_000 / (later - nanoseconds))


def _sample(read_counter: Callable[[], int]) -> tuple[int, int]:
    """Return counter and clock at one moment. Try ten times and keep the shortest try."""
    best: tuple[int, int, int] | None = None
    for _ in range(10):
        before = clock_gettime_ns(CLOCK_MONOTONIC_RAW)
        ticks = read_counter()
        after = clock_gettime_ns(CLOCK_MONOTONIC_RAW)
        if best is None or after - before < best[0]:
            best = after - before, ticks, (before + after) // 2
    assert best is not None
    return best[1], best[2]


def _known(entry: object) -> tuple[int, str]:
    if isinstance(entry, dict) and isinstance(entry.get("khz"), int):
        return entry["khz"], str(entry.get("boot"))
    return 0, ""
