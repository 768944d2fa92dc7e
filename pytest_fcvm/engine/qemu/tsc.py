"""The rate of this host's time stamp counter, which a guest under TCG reads as its own.

The guest's kernel must be told (`tsc_early_khz`), and the number is part of a snapshot's key: it is measured once per
boot, and kept from boot to boot as long as it is the same but for jitter.
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
    """Return the counter's rate in kHz, the same number for every process and every boot of this CPU.

    Raise HostError when it can be neither measured nor read.
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
    """Count for 50 ms. Return 0 where code of our own may not be executed (hardened hosts)."""
    import ctypes  # once per boot of the host: not worth its time in every run
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
    """Return counter and clock at one moment: of ten tries the one that took the shortest."""
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
