"""System calls that Python does not offer."""

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
    """Bind-mount `source` at `target`, or change the mount at `target`, by MS_* flags. Raise OSError."""
    _check(_LIBC.mount(os.fsencode(source), os.fsencode(target), None, ctypes.c_ulong(flags), None))


def prctl(option: int, value: int | bytes) -> None:
    """Set a property of this thread. Raise OSError."""
    _check(_LIBC.prctl(option, value, 0, 0, 0))


def real_time_ns() -> int:
    """Return the host's time of day in ns since 1970, accurate to a microsecond. No Python library can change it.

    Keep the interpreter's lock during the call: to take the lock again could take longer than a microsecond.
    """
    time = _Timespec()
    ctypes.pythonapi.clock_gettime(_CLOCK_REALTIME, ctypes.byref(time))
    return int(time.seconds * 10**9 + time.nanoseconds)


def unshare(flags: int) -> None:
    """Leave the namespaces of the CLONE_NEW* flags. Raise OSError. (`os.unshare` came with Python 3.12.)"""
    _check(_LIBC.unshare(flags))


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
