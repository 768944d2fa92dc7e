"""Compare a rewound VM with its snapshot: all of guest memory, and the state of each device.

The device state has QEMU's migration format (docs/devel/migration.rst of its source): a magic number and a version of
4 bytes each, then full sections. A section has the type 4, an id of 4 bytes, a length and a name, an instance and a
version of 4 bytes each, its data, and a footer of 0x7e and the id. A byte 0 ends the state.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from pytest_fcvm.engine.qemu.memory import find_mappings, opening_memory, read_whole
from pytest_fcvm.errors import EngineError

__all__ = ["list_differences"]

_HEAD_BYTES, _FULL, _FOOTER = 8, 4, b"\x7e"
_PAGE = 4096
_PIECE = 1 << 20
_NAMED = 8
_CLOCKS = ("timer", "mc146818rtc")  # sections with the time at which they are written


def list_differences(pid: int, memory: Path, now: bytes, then: bytes) -> list[str]:
    """Return what differs between a stopped VM and its snapshot: pages and devices, by their names.

    `now` and `then` are device states. Raise EngineError for one that cannot be read, HostError for memory.
    """
    pages = [page for page, _ in zip(_changed_pages(pid, memory), range(_NAMED), strict=False)]
    return [f"page {page:#x} of guest memory" for page in pages] + _changed_devices(now, then)


def _changed_pages(pid: int, memory: Path) -> Iterator[int]:
    with opening_memory(pid) as guest, memory.open("rb", buffering=0) as file:
        for mapping in find_mappings(pid, memory):
            for place in range(0, mapping.end - mapping.start, _PIECE):
                length = min(_PIECE, mapping.end - mapping.start - place)
                ours = read_whole(guest, length, mapping.start + place)
                theirs = read_whole(file.fileno(), length, mapping.offset + place)
                if ours != theirs:
                    yield from _changed_in(ours, theirs, mapping.offset + place)


def _changed_in(ours: bytes, theirs: bytes, place: int) -> Iterator[int]:
    for at in range(0, len(theirs), _PAGE):
        if ours[at : at + _PAGE] != theirs[at : at + _PAGE]:
            yield (place + at) // _PAGE


def _changed_devices(now: bytes, then: bytes) -> list[str]:
    changed = []
    for ours, theirs in zip_longest(_sections(now), _sections(then)):
        if ours != theirs and (ours or theirs)[0] not in _CLOCKS:
            changed.append(f"device {(ours or theirs)[0]}")
    return changed


def _sections(state: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the data of each section."""
    at = _HEAD_BYTES
    while state[at : at + 1] == bytes([_FULL]):
        number = state[at + 1 : at + 5]
        start = at + 6 + state[at + 5] + struct.calcsize(">II")
        name = state[at + 6 : at + 6 + state[at + 5]].decode("ascii", "replace")
        end = state.find(_FOOTER + number, start)
        if end < 0:
            raise EngineError(f"the device state has no end of the section {name}", hint="report this as a bug")
        yield name, state[start:end]
        at = end + len(_FOOTER) + len(number)
