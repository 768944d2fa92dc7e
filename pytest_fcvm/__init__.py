"""A fresh, warm, isolated microVM per test, from any OCI image.

The fixtures come with the pytest plugin; what is here is for type annotations, conftests and prepare functions.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_fcvm.clone import Clone
    from pytest_fcvm.errors import (
        CommandFailed,
        EngineError,
        EngineUnavailable,
        FcvmError,
        GuestError,
        GuestTimeout,
        HostError,
        ImageError,
        UsageProblem,
        WorkloadExited,
    )
    from pytest_fcvm.fixtures import CloneFactory, GroupFactory, SnapshotFactory
    from pytest_fcvm.group import Group
    from pytest_fcvm.model.net import Endpoint
    from pytest_fcvm.model.results import ExecResult
    from pytest_fcvm.model.specs import Prepare, VmSpec
    from pytest_fcvm.network.private import Network
    from pytest_fcvm.snapshot import Snapshot

__all__ = [
    "Clone",
    "CloneFactory",
    "CommandFailed",
    "Endpoint",
    "EngineError",
    "EngineUnavailable",
    "ExecResult",
    "FcvmError",
    "Group",
    "GroupFactory",
    "GuestError",
    "GuestTimeout",
    "HostError",
    "ImageError",
    "Network",
    "Prepare",
    "Snapshot",
    "SnapshotFactory",
    "UsageProblem",
    "VmSpec",
    "WorkloadExited",
]

_HOMES = {
    "Clone": "clone",
    "CloneFactory": "fixtures",
    "Endpoint": "model.net",
    "ExecResult": "model.results",
    "Group": "group",
    "GroupFactory": "fixtures",
    "VmSpec": "model.specs",
    "Network": "network",
    "Prepare": "model.specs",
    "Snapshot": "snapshot",
    "SnapshotFactory": "fixtures",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import pytest_fcvm` costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return __all__
