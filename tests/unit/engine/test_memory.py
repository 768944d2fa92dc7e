"""Copy the pages that a process has changed in a private mapping of a file."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_fcvm.engine.qemu.memory import save_private_pages
from pytest_fcvm.errors import HostError
from pytest_fcvm.host import own
from pytest_fcvm.host.sparse import copy_file

PAGE = mmap.PAGESIZE
PAGES = 4096
WRITES = {0: b"first", 1: b"second", 7: b"alone", 2000: b"in what was a hole", PAGES - 1: b"last"}
CHILD = """
import mmap, sys
memory = mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
for number, text in ast.literal_eval(sys.argv[2]).items():
    memory[number * mmap.PAGESIZE:number * mmap.PAGESIZE + len(text)] = text
memory[3 * mmap.PAGESIZE]  # only read
memory[5 * mmap.PAGESIZE:6 * mmap.PAGESIZE] = bytes(mmap.PAGESIZE)  # zeros where the file has something
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A file with holes and content."""
    path = tmp_path / "memory"
    with path.open("wb") as file:
        file.truncate(PAGES * PAGE)
        for number in (0, 1, 3, 5, 3000):
            file.seek(number * PAGE)
            file.write(b"base" * (PAGE // 4))
    return path


@pytest.fixture
def process(base: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has mapped the file and changed some pages."""
    child = subprocess.Popen(
        [sys.executable, "-c", "import ast, os\n" + CHILD.lstrip(), base, repr(WRITES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    with child:
        yield child
        child.kill()


def test_the_copy_is_what_the_process_sees(process: subprocess.Popen[bytes], base: Path, tmp_path: Path) -> None:
    expected = bytearray(base.read_bytes())
    for number, text in WRITES.items():
        expected[number * PAGE : number * PAGE + len(text)] = text
    expected[5 * PAGE : 6 * PAGE] = bytes(PAGE)
    copy = tmp_path / "copy"
    copy_file(base, copy)
    save_private_pages(process.pid, base, copy)
    assert copy.read_bytes() == expected
    assert copy.stat().st_mode & 0o777 == 0o600
    assert copy.stat().st_blocks * 512 < 64 * PAGE  # holes are holes


def test_the_mapping_is_found_after_the_file_was_renamed(
    process: subprocess.Popen[bytes], base: Path, tmp_path: Path
) -> None:
    renamed = base.rename(tmp_path / "renamed, with a space")
    copy = tmp_path / "copy"
    copy_file(renamed, copy)
    save_private_pages(process.pid, renamed, copy)
    assert copy.read_bytes()[7 * PAGE :].startswith(b"alone")


def test_a_process_that_does_not_map_the_file_is_reported(tmp_path: Path, base: Path) -> None:
    copy_file(base, tmp_path / "copy")
    with pytest.raises(HostError, match="does not have"):
        save_private_pages(os.getpid(), base, tmp_path / "copy")


def test_a_process_that_has_ended_is_reported(tmp_path: Path, base: Path) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    copy_file(base, tmp_path / "copy")
    with pytest.raises(HostError, match="cannot be copied"):
        save_private_pages(child.pid, base, tmp_path / "copy")


def test_a_copy_without_room_is_reported(base: Path, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot be made"):
        copy_file(base, tmp_path / "nowhere" / "copy")


def test_memory_that_cannot_be_read_in_full_is_reported(
    process: subprocess.Popen[bytes], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_file(base, tmp_path / "copy")
    read = os.pread
    monkeypatch.setattr(own.os, "pread", lambda fd, size, offset: b"" if size == 2 * PAGE else read(fd, size, offset))
    with pytest.raises(HostError, match="cannot be copied"):
        save_private_pages(process.pid, base, tmp_path / "copy")
