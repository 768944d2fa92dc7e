"""Mount namespaces, in which one program finds files at other paths. They end with their last process."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pytest_fcvm.errors import HostError
from pytest_fcvm.host import libc
from pytest_fcvm.host.own import os
from pytest_fcvm.host.threads import ServiceThread

__all__ = ["open_mounts"]


def open_mounts(binds: Iterable[tuple[Path, Path]]) -> int:
    """Return the descriptor of a new mount namespace, which the caller closes. `binds` are (source, target) pairs.

    Make the binds in their order. Devices work in them, whatever the options of the source's mount. Raise HostError
    where this process may not mount.
    """
    made: list[int] = []
    failed: list[OSError] = []

    def make() -> None:
        try:
            made.append(_make(binds))
        except OSError as error:
            failed.append(error)

    # A thread can have its own mount namespace, which ends with it.
    thread = ServiceThread(make, name="fcvm-mounts")
    thread.start()
    try:
        thread.join()
    except BaseException:
        thread.join()  # the thread makes a few system calls and does not block
        for descriptor in made:
            os.close(descriptor)
        raise
    if failed:
        raise HostError(
            f"files cannot be mounted: {failed[0].strerror}", hint="run as root, and in a container with CAP_SYS_ADMIN"
        ) from failed[0]
    return made[0]


def _make(binds: Iterable[tuple[Path, Path]]) -> int:
    libc.unshare(libc.CLONE_NEWNS)
    libc.mount("/", libc.MS_REC | libc.MS_PRIVATE)
    for source, target in binds:
        libc.mount(target, libc.MS_BIND, source)
        libc.mount(target, libc.MS_REMOUNT | libc.MS_BIND)  # removes nodev and noexec
    return os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
