"""Files at other places for one program alone: a mount namespace that goes with whoever is in it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pytest_fcvm.errors import HostError
from pytest_fcvm.host import libc
from pytest_fcvm.host.own import os
from pytest_fcvm.host.threads import ServiceThread

__all__ = ["open_mounts"]


def open_mounts(binds: Iterable[tuple[Path, Path]]) -> int:
    """Return a new mount namespace's descriptor, the caller's to close; in it each first path is at the second as well.

    The binds are made in their order, and devices work in them whatever the file system's own mount says. Raise
    HostError where this process may not mount.
    """
    made: list[int] = []
    failed: list[OSError] = []

    def make() -> None:
        try:
            made.append(_make(binds))
        except OSError as error:
            failed.append(error)

    # A thread can have a namespace to itself, and takes it along when it ends.
    thread = ServiceThread(make, name="fcvm-mounts")
    thread.start()
    try:
        thread.join()
    except BaseException:
        thread.join()  # it makes some system calls, and waits for nobody
        for descriptor in made:
            os.close(descriptor)
        raise
    if failed:
        raise HostError(
            f"files cannot be mounted: {failed[0].strerror}", hint="it takes root, and in a container CAP_SYS_ADMIN"
        ) from failed[0]
    return made[0]


def _make(binds: Iterable[tuple[Path, Path]]) -> int:
    libc.unshare(libc.CLONE_NEWNS)
    libc.mount("/", libc.MS_REC | libc.MS_PRIVATE)
    for source, target in binds:
        libc.mount(target, libc.MS_BIND, source)
        libc.mount(target, libc.MS_REMOUNT | libc.MS_BIND)  # no flag that stays: neither nodev nor noexec
    return os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
