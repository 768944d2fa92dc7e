"""The Firecracker of this host: where it is, which it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pytest_fcvm.engine.firecracker.version import FirecrackerVersion, parse_version
from pytest_fcvm.errors import EngineError
from pytest_fcvm.host.own import os
from pytest_fcvm.host.process import find_tool, run_tool
from pytest_fcvm.host.records import Digests, open_record, stamp

__all__ = ["PROGRAM", "Installation", "find_firecracker", "inspect", "tools_dir"]

PROGRAM = "firecracker"
_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Installation:
    """One Firecracker. `digest` is that of the binary."""

    binary: Path
    version: FirecrackerVersion
    digest: str


def tools_dir(cache_dir: Path) -> Path:
    """Return the directory for programs that `fcvm setup` got."""
    return cache_dir / "tools"


def find_firecracker(binary: Path | None, cache_dir: Path) -> Path | None:
    """Return the Firecracker to use: the one named, else the one on PATH, else the one `fcvm setup` got, else None."""
    got = tools_dir(cache_dir) / PROGRAM
    return binary or find_tool(PROGRAM) or (got if os.access(got, os.X_OK) else None)


def inspect(binary: Path, record_file: Path) -> Installation:
    """Ask a Firecracker what it is. What it said is kept in `record_file` until it changes.

    Raise HostError when it cannot be run, EngineError when it is not Firecracker.
    """
    with open_record(record_file) as record:
        known = record.get(str(binary))
        if not (isinstance(known, dict) and known.get("stamp") == _stamp(binary)):
            known = record[str(binary)] = _ask(binary)
    version = parse_version(str(known["version"]))
    assert version is not None
    return Installation(binary=binary, version=version, digest=str(known["digest"]))


def _stamp(binary: Path) -> str:
    try:
        return stamp(binary)
    except OSError:
        return ""


def _ask(binary: Path) -> dict[str, object]:
    said = run_tool([binary, "--version"], timeout_s=_TIMEOUT_S)
    version = parse_version(said)
    if version is None or "firecracker" not in said.lower():
        raise EngineError(f"{binary} does not say that it is Firecracker: {said.strip()[:200]!r}")
    return {"version": str(version), "digest": Digests({}).of(binary), "stamp": stamp(binary)}
