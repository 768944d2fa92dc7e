"""Device states of QEMU: their sections, and which of them differ."""

from __future__ import annotations

import struct

import pytest

from pytest_fcvm.engine.qemu.device_state import find_differences, split_sections
from pytest_fcvm.errors import EngineError


def section(number: int, name: str, data: bytes, instance: int = 0) -> bytes:
    head = struct.pack(">BIB", 4, number, len(name)) + name.encode() + struct.pack(">II", instance, 1)
    return head + data + b"\x7e" + struct.pack(">I", number)


def state(*sections: bytes) -> bytes:
    return b"QEVM" + struct.pack(">I", 3) + b"".join(sections) + b"\0"


def test_sections_are_found_by_name_and_those_of_one_name_are_numbered() -> None:
    whole = state(section(2, "timer", b"abc"), section(7, "cpu", b""), section(8, "cpu", b"x", instance=1))
    assert split_sections(whole) == {"timer": b"abc", "cpu": b"", "cpu#1": b"x"}


def test_data_with_the_bytes_of_a_footer_does_not_end_its_section() -> None:
    data = b"\x7e\0\0\0\x02 and more"
    assert split_sections(state(section(2, "timer", data))) == {"timer": data}


def test_differing_and_missing_sections_are_named() -> None:
    one = state(section(2, "timer", b"1"), section(3, "cpu", b"1"), section(4, "apic", b"1"))
    two = state(section(2, "timer", b"1"), section(3, "cpu", b"2"), section(5, "serial", b"1"))
    assert find_differences(one, two) == ["cpu", "apic", "serial"]
    assert find_differences(one, one) == []


def test_the_clock_of_the_board_may_differ() -> None:
    assert find_differences(state(section(2, "mc146818rtc", b"1")), state(section(2, "mc146818rtc", b"2"))) == []


@pytest.mark.parametrize("cut", [0, 1, 9, 14, 20, -1])
def test_a_state_that_is_cut_off_is_refused(cut: int) -> None:
    with pytest.raises(EngineError, match="device state of QEMU"):
        split_sections(state(section(2, "timer", b"abc"), section(3, "cpu", b"def"))[:cut])


def test_another_file_is_refused() -> None:
    with pytest.raises(EngineError, match="no device state"):
        split_sections(b"#!/bin/sh\n")
