"""Compare two device states of QEMU, section by section.

A state is what `xen-save-devices-state` writes: a header of eight bytes, then full sections, each with the name of its
device and a footer (QEMU's docs/devel/migration, "Stream structure").
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

from pytest_fcvm.errors import EngineError

__all__ = ["find_differences", "split_sections"]

_HEADER = b"QEVM\0\0\0\x03"
_FULL, _FOOTER, _END = 4, b"\x7e", b"\0"
# The clock of the board shows the host's time, and goes on while the guest stands.
_CLOCKS = frozenset({"mc146818rtc"})


def split_sections(state: bytes) -> Mapping[str, bytes]:
    """Return the data of each section by name. Sections of one name are numbered. Raise EngineError."""
    if not state.startswith(_HEADER):
        raise EngineError("this is no device state of QEMU")
    try:
        return dict(_sections(state))
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise EngineError("the device state of QEMU is cut off or damaged") from error


def find_differences(state: bytes, other: bytes) -> list[str]:
    """Return the names of the sections that differ between two states, except for clocks. Raise EngineError."""
    one, two = split_sections(state), split_sections(other)
    names = dict.fromkeys((*one, *two))
    return [name for name in names if one.get(name) != two.get(name) and name.split("#")[0] not in _CLOCKS]


def _sections(state: bytes) -> Iterator[tuple[str, bytes]]:
    at = len(_HEADER)
    while state[at] == _FULL:
        number, length = struct.unpack_from(">IB", state, at + 1)
        start = at + 6 + length
        name = state[at + 6 : start].decode("ascii")
        instance, _version = struct.unpack_from(">II", state, start)
        end = _find_end(state, start + 8, _FOOTER + struct.pack(">I", number))
        yield f"{name}#{instance}" if instance else name, state[start + 8 : end]
        at = end + 5
    if state[at:] != _END:
        raise IndexError(at)


def _find_end(state: bytes, start: int, footer: bytes) -> int:
    """Return where a section's footer is. Data may contain a footer's bytes, but hardly with a section after them."""
    end = state.find(footer, start)
    while end >= 0 and state[end + 5] != _FULL and state[end + 5 :] != _END:
        end = state.find(footer, end + 1)
    if end < 0:
        raise IndexError(start)
    return end
