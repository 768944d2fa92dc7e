"""A fresh, warm, isolated microVM per test, from any OCI image.

The fixtures come with the pytest plugin; what is here is for type annotations, conftests and prepare functions.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_fcvm.clone import Clone, Guest, Snapshot
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
    from pytest_fcvm.fixtures import CloneFactory, GroupFactory, NetworkFactory, SnapshotFactory
    from pytest_fcvm.group import Group
    from pytest_fcvm.guest.process import GuestProcess
    from pytest_fcvm.model.guest import ExitStatus
    from pytest_fcvm.model.net import Endpoint, PublishedPort
    from pytest_fcvm.model.results import ExecResult, Timeline
    from pytest_fcvm.model.specs import CloneFields, MappedPath, NetworkSpec, Prepare, ReadySpec, SpecFields, VmSpec
    from pytest_fcvm.network.private import Network
    from pytest_fcvm.network.switch import Counters

__all__ = [
    "Clone",
    "CloneFactory",
    "CloneFields",
    "CommandFailed",
    "Counters",
    "Endpoint",
    "EngineError",
    "EngineUnavailable",
    "ExecResult",
    "ExitStatus",
    "FcvmError",
    "Group",
    "GroupFactory",
    "Guest",
    "GuestError",
    "GuestProcess",
    "GuestTimeout",
    "HostError",
    "ImageError",
    "MappedPath",
    "Network",
    "NetworkFactory",
    "NetworkSpec",
    "Prepare",
    "PublishedPort",
    "ReadySpec",
    "Snapshot",
    "SnapshotFactory",
    "SpecFields",
    "Timeline",
    "UsageProblem",
    "VmSpec",
    "WorkloadExited",
]

_HOMES = {
    "Clone": "clone",
    "CloneFactory": "fixtures",
    "CloneFields": "model.specs",
    "Counters": "network.switch",
    "Endpoint": "model.net",
    "ExecResult": "model.results",
    "ExitStatus": "model.guest",
    "Group": "group",
    "GroupFactory": "fixtures",
    "Guest": "clone",
    "GuestProcess": "guest.process",
    "MappedPath": "model.specs",
    "Network": "network.private",
    "NetworkFactory": "fixtures",
    "NetworkSpec": "model.specs",
    "Prepare": "model.specs",
    "PublishedPort": "model.net",
    "ReadySpec": "model.specs",
    "Snapshot": "clone",
    "SnapshotFactory": "fixtures",
    "SpecFields": "model.specs",
    "Timeline": "model.results",
    "VmSpec": "model.specs",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import pytest_fcvm` costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return __all__
