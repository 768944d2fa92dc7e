"""Where the agent's binaries lie in the installed package."""

from __future__ import annotations

from pathlib import Path

from pytest_fcvm.errors import HostError

__all__ = ["resolve_agent"]

_FOLDER = Path(__file__).parent.parent / "agents"


def resolve_agent(machine: str = "x86_64") -> Path:
    """Return the static agent for a machine type. Raise HostError when the package was installed without it."""
    path = _FOLDER / f"agent-{machine}"
    if not path.is_file():
        raise HostError(
            f"this pytest-fcvm has no guest agent for {machine}", hint="run guest_image/build, or reinstall"
        )
    return path
