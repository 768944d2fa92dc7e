"""The installed wheel of tools: what it was made of, and that its programs are static."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

_DYNAMIC = b"/ld-"  # in the path of a dynamic program's loader, which is near the beginning of the file


@pytest.fixture
def wheel() -> Path:
    """Return the directory of the installed wheel, also where the package is hidden from other tests."""
    try:
        return Path(str(distribution("pytest-fcvm-tools-x86-64").locate_file("pytest_fcvm_tools_x86_64")))
    except PackageNotFoundError:
        pytest.skip("the wheel of tools is not installed: make tools")


def test_the_wheel_names_its_sources_and_programs(wheel: Path) -> None:
    facts = json.loads((wheel / "source.json").read_text())
    assert set(facts["sources"]) == {"squashfs-tools", "lz4", "libzstd", "skopeo"}
    sums = [checksum for source in facts["sources"].values() for checksum in source["sha256"].values()]
    assert all(re.fullmatch("[0-9a-f]{64}", checksum) for checksum in sums)
    assert all(re.fullmatch(r"\S+ v\S+ h1:\S+=", module) for module in facts["modules"])
    found = {name: hashlib.sha256((wheel / name).read_bytes()).hexdigest() for name in facts["programs"]}
    assert found == facts["programs"]


def test_the_wheel_has_every_licence(wheel: Path) -> None:
    facts = json.loads((wheel / "source.json").read_text())
    assert "GNU GENERAL PUBLIC LICENSE" in (wheel / "LICENSE.squashfs-tools").read_text()
    assert {f"LICENSE.{name}" for name in (*facts["sources"], "musl")} <= {path.name for path in wheel.iterdir()}
    licences = (wheel / "LICENSE.skopeo-modules").read_text()
    assert [module for module in facts["modules"] if module.split()[0] not in licences] == []


@pytest.mark.parametrize("name", ["skopeo", "mksquashfs", "zstd", "lz4"])
def test_a_program_of_the_wheel_is_static_and_runs(wheel: Path, name: str) -> None:
    assert _DYNAMIC not in (wheel / name).read_bytes()[:4096]
    option = "-version" if name == "mksquashfs" else "--version"
    done = subprocess.run([wheel / name, option], env={}, capture_output=True, check=False, timeout=60)
    assert re.search(rb"\d+\.\d+\.\d+", done.stdout + done.stderr)
