"""Read the memory of a clone, and copy it: the pages that differ from its snapshot's file.

A clone maps that file privately, so the kernel knows which pages differ. /proc/PID/pagemap (Linux'
Documentation/admin-guide/mm/pagemap.rst) marks the pages that are no longer the file's.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from pytest_fcvm.errors import HostError
from pytest_fcvm.host.own import os

__all__ = ["Mapping", "find_mappings", "opening_memory", "read_whole", "save_private_pages"]

_PAGE = os.sysconf("SC_PAGE_SIZE")
_ENTRY = 8  # bytes of a page's entry in pagemap
_STATE_SHIFT = 61  # the bits above: present; swapped out; a page of a file, or shared
_PRIVATE = (0b100, 0b010)
_PIECE_PAGES = 1024


@dataclass(frozen=True)
class Mapping:
    """Where a process has a part of a file: addresses from `start` to `end`, `offset` bytes into the file."""

    start: int
    end: int
    offset: int


def save_private_pages(pid: int, source: Path, dest: Path) -> None:
    """Write the pages that a stopped process has changed in its mapping of `source` to `dest`, a copy of `source`.

    Raise HostError where that process may not be read, or does not map `source`.
    """
    with opening_memory(pid) as memory, ExitStack() as files:
        pagemap = _open(files, f"/proc/{pid}/pagemap", os.O_RDONLY)
        target = _open(files, dest, os.O_WRONLY)
        for mapping in find_mappings(pid, source):
            _save(mapping, pagemap, memory, target)


@contextmanager
def opening_memory(pid: int) -> Iterator[int]:
    """Yield a descriptor of a process's memory, to read at the process's addresses. Raise HostError for any OSError."""
    with ExitStack() as files:
        try:
            yield _open(files, f"/proc/{pid}/mem", os.O_RDONLY)
        except OSError as error:
            raise HostError(
                f"the memory of process {pid} cannot be copied: {error.strerror}",
                hint="a process may be read by its parents where /proc/sys/kernel/yama/ptrace_scope is 0 or 1",
            ) from error


def _open(files: ExitStack, path: str | Path, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    files.callback(os.close, descriptor)
    return descriptor


def find_mappings(pid: int, source: Path) -> list[Mapping]:
    """Return a process's mappings of a file (proc_pid_maps(5)). Raise HostError where there is none."""
    if mappings := list(_list_mappings(pid, source)):
        return mappings
    raise HostError(f"process {pid} does not have {source} in its memory", hint="report this as a bug")


def _list_mappings(pid: int, source: Path) -> Iterator[Mapping]:
    """Yield mappings of a file. Compare device and inode: the name may have changed."""
    status = source.stat()
    wanted = (f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", str(status.st_ino))
    for line in Path(f"/proc/{pid}/maps").read_text("utf-8", "replace").splitlines():
        addresses, _, offset, device, inode = line.split(maxsplit=5)[:5]
        if (device, inode) == wanted:
            start, end = (int(text, 16) for text in addresses.split("-"))
            yield Mapping(start, end, int(offset, 16))


def _save(mapping: Mapping, pagemap: int, memory: int, target: int) -> None:
    for first, count in _private_runs(mapping, pagemap):
        data = read_whole(memory, count * _PAGE, mapping.start + first * _PAGE)
        written = 0
        while written < len(data):
            place = mapping.offset + first * _PAGE + written
            written += os.pwrite(target, memoryview(data)[written:], place)


def read_whole(descriptor: int, size: int, offset: int) -> bytes:
    """Return `size` bytes. Raise OSError for fewer: a copy would have the base's bytes in place of the missing ones."""
    data = bytearray()
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        data += more
    return bytes(data)


def _private_runs(mapping: Mapping, pagemap: int) -> Iterator[tuple[int, int]]:
    """Yield runs of private pages as (first page, count), counted from the mapping's start."""
    pages = (mapping.end - mapping.start) // _PAGE
    entries = array("Q")
    entries.frombytes(read_whole(pagemap, pages * _ENTRY, mapping.start // _PAGE * _ENTRY))
    private = (page for page, entry in enumerate(entries) if entry >> _STATE_SHIFT in _PRIVATE)
    for _, run in groupby(enumerate(private), lambda pair: pair[1] - pair[0]):
        numbers = [page for _, page in run]
        for start in range(0, len(numbers), _PIECE_PAGES):
            yield numbers[start], min(_PIECE_PAGES, len(numbers) - start)
