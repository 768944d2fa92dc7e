"""Where the agent's binaries lie in the installed package."""

from __future__ import annotations

from pathlib import Path

from pytest_fcvm.errors import HostError

__all__ = ["resolve_agent"]

_DIRECTORY = Path(__file__).parent.parent / "agents"


def resolve_agent(running: str = "x86_64") -> Path:
    """Return the static agent for a machine type. Raise HostError when the package was installed without it."""
    path = _DIRECTORY / f"agent-{running}"
    if not path.is_file():
        raise HostError(
            f"this pytest-fcvm has no guest agent for {running}", hint="run guest_image/build, or reinstall"
        )
    return path
