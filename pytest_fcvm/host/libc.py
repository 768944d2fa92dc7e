"""The system calls that Python does not have."""

from __future__ import annotations

import ctypes
import os

__all__ = [
    "CLONE_NEWNS",
    "CLONE_NEWPID",
    "CLONE_NEWUSER",
    "MS_BIND",
    "MS_PRIVATE",
    "MS_REC",
    "MS_REMOUNT",
    "PR_SET_CHILD_SUBREAPER",
    "PR_SET_NAME",
    "PR_SET_PDEATHSIG",
    "mount",
    "prctl",
    "real_time_ns",
    "unshare",
]

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x00020000, 0x10000000, 0x20000000  # linux/sched.h
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 0x20, 0x1000, 0x4000, 0x40000  # linux/mount.h
PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36  # linux/prctl.h

_LIBC = ctypes.CDLL(None, use_errno=True)
_CLOCK_REALTIME = 0  # linux/time.h


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def mount(target: str | os.PathLike[str], flags: int, source: str | os.PathLike[str] = "none") -> None:
    """Bind `source` there, or change what is mounted there, as the MS_* flags say. Raise OSError."""
    _check(_LIBC.mount(os.fsencode(source), os.fsencode(target), None, ctypes.c_ulong(flags), None))


def prctl(option: int, value: int | bytes) -> None:
    """Set a property of this thread. Raise OSError."""
    _check(_LIBC.prctl(option, value, 0, 0, 0))


def real_time_ns() -> int:
    """Return the host's time of day in ns since 1970, to the microsecond; no library of Python's moves it.

    The interpreter's lock is kept meanwhile: getting it back could take longer than the answer is good for.
    """
    time = _Timespec()
    ctypes.pythonapi.clock_gettime(_CLOCK_REALTIME, ctypes.byref(time))
    return int(time.seconds * 10**9 + time.nanoseconds)


def unshare(flags: int) -> None:
    """Leave the namespaces given by CLONE_NEW* flags. Raise OSError. (`os.unshare` came with Python 3.12.)"""
    _check(_LIBC.unshare(flags))


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
