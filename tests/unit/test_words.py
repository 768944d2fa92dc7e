"""One word for one thing: retired identifiers and phrases do not come back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_PLACES = ("pytest_fcvm", "tests", "docs", "guest_image", "examples", "benchmarks", "README.md", "CONTRIBUTING.md")
_SUFFIXES = {"", ".c", ".config", ".h", ".md", ".py", ".sh", ".toml"}
_WHEELS = (
    "kernel/pytest_fcvm_kernel_x86_64",
    "tools/pytest_fcvm_tools_x86_64",
    "vmm/pytest_fcvm_qemu_x86_64",
)
_BUILT = (ROOT / "pytest_fcvm/agents", *(ROOT / "guest_image" / wheel for wheel in _WHEELS))
_NOT_SEARCHED = (Path(__file__), *_BUILT)

IDENTIFIERS = {
    "Cable": "Attachment",
    "Ingredients": "SnapshotInputs",
    "Ledger": "Reservations",
    "MachineSpec": "VmSpec",
    "Shelf": "Collection",
    "Spares": "Standby",
    "Workshop": "SnapshotRuntime",
    "_told": "translating_errors",
    "also_close": "add_cleanup",
    "also_tell": "add_evidence",
    "descriptors_told": "translating_emfile",
    "enclose": "open_namespace",
    "enclosed": "in a network namespace",
    "ends.h": "child_stdio.h",
    "go_on": "resume_session",
    "ingredients": "inputs",
    "kept.h": "ring.h",
    "park": "suspend",
    "parked": "suspended",
    "resumes_deaf": "vsock_hangs_after_resume",
    "take_memory": "inflate_balloon",
    "tell_end": "describe_exit",
    "way_back": "resume_token",
    "ways_out": "egress",
}
PHRASES = {
    "cable": "attachment",
    "cannot be had": "is unavailable",
    "furnish": "mount into",
    "furnished": "mounted into",
    "in the midst": "during",
    "its last words": "its final output",
    "lead out": "egress",
    "network card": "NIC",
    "network cards": "NICs",
    "processor": "CPU",
    "processors": "CPUs",
    "put aside": "quarantine",
    "root folder": "root directory",
    "takes no rights": "requires no privileges",
    "takes rights": "requires privileges",
    "takes root": "requires root",
    "the spare": "the standby VMM",
    "way out": "egress, or what to do",
    "ways out": "egress",
}


@cache
def lines() -> tuple[tuple[str, str], ...]:
    """Return every line of the project's sources with its place."""
    return tuple((f"{path.relative_to(ROOT)}:{number}", line) for path in sources() for number, line in numbered(path))


def sources() -> Iterator[Path]:
    for place in _PLACES:
        root = ROOT / place
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            is_skipped = any(path.is_relative_to(skipped) for skipped in _NOT_SEARCHED) or "__pycache__" in path.parts
            if path.is_file() and path.suffix in _SUFFIXES and not is_skipped:
                yield path


def numbered(path: Path) -> Iterator[tuple[int, str]]:
    return enumerate(path.read_text(encoding="utf-8").splitlines(), 1)


def uses(word: str, flags: re.RegexFlag = re.NOFLAG) -> list[str]:
    """Return the lines that contain a whole word or phrase."""
    pattern = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", flags)
    return [f"{place}: {line.strip()}" for place, line in lines() if pattern.search(line)]


@pytest.mark.parametrize("old", IDENTIFIERS)
def test_a_retired_identifier_is_not_used(old: str) -> None:
    found = uses(old)
    assert not found, f"write {IDENTIFIERS[old]}:\n" + "\n".join(found)


@pytest.mark.parametrize("old", PHRASES)
def test_a_retired_phrase_is_not_used(old: str) -> None:
    found = uses(old, re.IGNORECASE)
    assert not found, f"write {PHRASES[old]}:\n" + "\n".join(found)


def test_the_search_covers_the_sources() -> None:
    assert uses("VmSpec")
    assert {place.partition("/")[0].partition(":")[0] for place, _ in lines()} == set(_PLACES)
    assert not uses("VmSpe"), "a part of a word does not count"
