"""Finds the agent's binaries in the installed package."""

from __future__ import annotations

from pathlib import Path

from pytest_fcvm.errors import HostError

__all__ = ["resolve_agent"]

_DIRECTORY = Path(__file__).parent.parent / "agents"


def resolve_agent(arch: str = "x86_64") -> Path:
    """Return the static agent for a CPU architecture. Raise HostError when the package was installed without it."""
    path = _DIRECTORY / f"agent-{arch}"
    if not path.is_file():
        raise HostError(f"this pytest-fcvm has no guest agent for {arch}", hint="run guest_image/build, or reinstall")
    return path
