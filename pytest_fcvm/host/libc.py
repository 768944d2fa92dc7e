"""The system calls that Python does not have, for the guard and its spawner."""

from __future__ import annotations

import ctypes
import os

__all__ = [
    "CLONE_NEWPID",
    "CLONE_NEWUSER",
    "PR_SET_CHILD_SUBREAPER",
    "PR_SET_NAME",
    "PR_SET_PDEATHSIG",
    "prctl",
    "unshare",
]

CLONE_NEWUSER, CLONE_NEWPID = 0x10000000, 0x20000000  # linux/sched.h
PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36  # linux/prctl.h

_LIBC = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int | bytes) -> None:
    """Set a property of this thread. Raise OSError."""
    _check(_LIBC.prctl(option, value, 0, 0, 0))


def unshare(flags: int) -> None:
    """Leave the namespaces given by CLONE_NEW* flags. Raise OSError. (`os.unshare` came with Python 3.12.)"""
    _check(_LIBC.unshare(flags))


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
