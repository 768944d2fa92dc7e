"""Programs of this project's wheels are found where the host has none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pytest_fcvm.cli.doctor import _tool
from pytest_fcvm.cli.setup import missing_packages
from pytest_fcvm.host.bundled import bundle_of, find_bundled
from pytest_fcvm.host.own import shutil
from pytest_fcvm.host.process import find_tool

_PACKAGE = "pytest_fcvm_tools_x86_64"
_NAMES = ("skopeo", "mksquashfs", "zstd", "lz4")


def _write_programs(directory: Path, *names: str, mode: int = 0o755) -> Path:
    directory.mkdir()
    for name in names:
        (directory / name).write_text(f"#!/bin/sh\necho {name} of {directory.name}\n")
        (directory / name).chmod(mode)
    return directory


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put programs of the host on PATH."""
    directory = _write_programs(tmp_path / "bin", *_NAMES, "fcvm-other")
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return directory


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a wheel with programs."""
    directory = _write_programs(tmp_path / _PACKAGE, *_NAMES, "fcvm-other")
    (directory / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return directory


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without any program."""
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)


@pytest.mark.parametrize("name", _NAMES)
def test_the_hosts_program_is_found_before_the_wheels(host: Path, wheel: Path, name: str) -> None:
    assert find_tool(name) == host / name
    assert bundle_of(wheel / name) == "pytest-fcvm-tools-x86-64"
    assert bundle_of(host / name) == ""


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("name", _NAMES)
def test_a_bare_host_uses_the_program_of_the_wheel(wheel: Path, name: str) -> None:
    assert find_tool(name) == wheel / name


def test_without_the_wheel_the_hosts_program_is_found(host: Path) -> None:
    assert find_bundled("skopeo") is None
    assert find_tool("skopeo") == host / "skopeo"


def test_a_program_that_is_not_the_wheels_is_the_hosts(host: Path, wheel: Path) -> None:
    assert (wheel / "fcvm-other").exists()
    assert find_tool("fcvm-other") == host / "fcvm-other"


@pytest.mark.usefixtures("bare")
def test_a_program_of_the_wheel_that_cannot_be_run_is_passed_over(wheel: Path) -> None:
    (wheel / "zstd").chmod(0o644)
    (wheel / "lz4").unlink()
    assert find_tool("zstd") is None
    assert find_tool("lz4") is None


@pytest.mark.usefixtures("bare", "wheel")
def test_with_the_wheel_setup_installs_none_of_its_programs() -> None:
    assert not {"skopeo", "squashfs-tools", "zstd", "lz4"} & set(missing_packages())


def test_the_doctor_names_where_a_program_comes_from(host: Path, wheel: Path, request: pytest.FixtureRequest) -> None:
    assert _tool("zstd", "zstd") == f"zstd of bin ({host / 'zstd'})"
    request.getfixturevalue("bare")
    assert _tool("zstd", "zstd") == f"zstd of {_PACKAGE} (pytest-fcvm-tools-x86-64)"
