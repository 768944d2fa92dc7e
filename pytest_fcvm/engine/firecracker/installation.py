"""The Firecracker of this host: where it is, and which version."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pytest_fcvm.engine.firecracker.version import FirecrackerVersion, parse_version
from pytest_fcvm.errors import EngineError
from pytest_fcvm.host.own import os
from pytest_fcvm.host.process import find_tool, run_tool
from pytest_fcvm.host.records import Digests, Record, facts_about, stamps_of

__all__ = ["PROGRAM", "Installation", "find_firecracker", "inspect", "tools_dir"]

PROGRAM = "firecracker"
_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Installation:
    """One Firecracker. `digest` is the SHA-256 of the binary."""

    binary: Path
    version: FirecrackerVersion
    digest: str


def tools_dir(cache_dir: Path) -> Path:
    """Return the directory for programs that `fcvm setup` downloads."""
    return cache_dir / "tools"


def find_firecracker(binary: Path | None, cache_dir: Path) -> Path | None:
    """Return the Firecracker to use: `binary`, else the one on PATH, else that of `fcvm setup`, else None."""
    downloaded = tools_dir(cache_dir) / PROGRAM
    return binary or find_tool(PROGRAM) or (downloaded if os.access(downloaded, os.X_OK) else None)


def inspect(binary: Path, record_file: Path) -> Installation:
    """Return what a Firecracker is. `record_file` keeps the answer until the binary changes.

    Raise HostError when the binary cannot be run, EngineError when it is not Firecracker.
    """
    known = facts_about(binary, record_file, _find_facts)
    version = parse_version(str(known["version"]))
    assert version is not None
    return Installation(binary=binary, version=version, digest=str(known["digest"]))


def _find_facts(binary: Path) -> Record:
    output = run_tool([binary, "--version"], timeout_s=_TIMEOUT_S)
    version = parse_version(output)
    if version is None or "firecracker" not in output.lower():
        raise EngineError(f"{binary} does not say that it is Firecracker: {output.strip()[:200]!r}")
    return {"version": str(version), "stamps": stamps_of([binary]), "digest": Digests({}).of(binary)}
