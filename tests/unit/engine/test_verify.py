"""A rewound VM against its snapshot: pages of another process, and sections of a device state."""

from __future__ import annotations

import mmap
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_fcvm.engine.qemu.verify import list_differences
from pytest_fcvm.errors import EngineError, HostError

PAGE, PAGES = mmap.PAGESIZE, 1024
CHILD = """
import mmap, os, sys
memory = mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
for number in sys.argv[2].split():
    memory[int(number) * mmap.PAGESIZE] ^= 1
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    path = tmp_path / "memory"
    path.write_bytes(bytes(range(256)) * (PAGE * PAGES // 256))
    return path


@pytest.fixture
def process(memory: Path, request: pytest.FixtureRequest) -> Iterator[int]:
    """A process that has mapped the file and changed the pages of the parameter."""
    command = [sys.executable, "-c", CHILD, memory, getattr(request, "param", "")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        yield child.pid
        child.kill()


def _state(**sections: bytes) -> bytes:
    state = b"QEVM" + struct.pack(">I", 3)
    for number, (name, data) in enumerate(sections.items()):
        head = struct.pack(">BIB", 4, number, len(name)) + name.encode() + struct.pack(">II", 0, 1)
        state += head + data + b"\x7e" + struct.pack(">I", number)
    return state + b"\0"


def test_an_equal_vm_differs_in_nothing(process: int, memory: Path) -> None:
    state = _state(cpu=b"registers", serial=b"fifo")
    assert list_differences(process, memory, state, state) == []


@pytest.mark.parametrize("process", ["0 255 256 1023"], indirect=True)
def test_pages_that_differ_are_named(process: int, memory: Path) -> None:
    state = _state(cpu=b"registers")
    expected = [f"page {number:#x} of guest memory" for number in (0, 255, 256, 1023)]
    assert list_differences(process, memory, state, state) == expected


@pytest.mark.parametrize("process", [" ".join(map(str, range(100)))], indirect=True)
def test_a_vm_that_differs_in_all_is_described_in_short(process: int, memory: Path) -> None:
    assert len(list_differences(process, memory, _state(), _state())) == 8


def test_devices_that_differ_are_named_and_clocks_are_not(process: int, memory: Path) -> None:
    then = _state(timer=b"12", mc146818rtc=b"12", cpu=b"registers", serial=b"\x7efifo", virtio=b"x")
    now = _state(timer=b"13", mc146818rtc=b"13", cpu=b"registerS", serial=b"\x7efifo", virtio=b"xy")
    assert list_differences(process, memory, now, then) == ["device cpu", "device virtio"]


def test_a_device_that_came_or_went_is_named(process: int, memory: Path) -> None:
    assert list_differences(process, memory, _state(cpu=b"1"), _state(cpu=b"1", disk=b"2")) == ["device disk"]
    assert list_differences(process, memory, _state(cpu=b"1", disk=b"2"), _state(cpu=b"1")) == ["device disk"]


def test_a_state_that_ends_early_is_an_error(process: int, memory: Path) -> None:
    whole = _state(cpu=b"registers")
    with pytest.raises(EngineError, match="no end of the section cpu"):
        list_differences(process, memory, whole[:-6], whole)


def test_a_process_without_the_memory_is_an_error(memory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"x" * PAGE)
    with subprocess.Popen(["sleep", "60"]) as child:
        with pytest.raises(HostError, match="does not have"):
            list_differences(child.pid, other, _state(), _state())
        child.kill()
