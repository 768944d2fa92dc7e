"""The public face: what `import pytest_fcvm` offers, and that a user's annotations find everything there."""

from __future__ import annotations

import inspect
import re
import typing
from typing import Any

import pytest

import pytest_fcvm
from pytest_fcvm import fixtures
from pytest_fcvm.model.specs import CloneFields, SpecFields

PUBLIC = [
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


def test_the_public_names_are_these() -> None:
    assert sorted(pytest_fcvm.__all__) == sorted(PUBLIC)
    assert dir(pytest_fcvm) == pytest_fcvm.__all__


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_can_be_imported_and_is_documented(name: str) -> None:
    found = getattr(pytest_fcvm, name)
    assert found.__name__ == name
    assert inspect.getdoc(found)


def test_a_name_that_is_not_public_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Harness'"):
        _ = pytest_fcvm.Harness


@pytest.mark.parametrize("kind", [pytest_fcvm.Clone, pytest_fcvm.Guest, pytest_fcvm.Network, pytest_fcvm.Snapshot])
def test_what_public_methods_take_and_return_is_public(kind: type) -> None:
    """All types of ours in their annotations, but a network's view of a clone and what its `with` statements hold."""
    internal = {"Segment", "Attachment", "_Fault"}
    names = {name.rpartition(".")[2] for name in _own_types(kind)}
    assert names - internal <= set(PUBLIC)


def _own_types(kind: type) -> set[str]:
    found = set()
    for name, member in inspect.getmembers(kind):
        function = member.fget if isinstance(member, property) else member
        if name.startswith("_") or not inspect.isfunction(function) or not _is_ours(function):
            continue
        known = vars(inspect.getmodule(function))
        words = re.findall(r"\w+", " ".join(function.__annotations__.values()))
        found |= {word for word in words if isinstance(known.get(word), type) and _is_ours(known[word])}
    return found


def _is_ours(item: Any) -> bool:
    return str(item.__module__).startswith("pytest_fcvm")


def test_the_fields_of_factories_are_those_of_the_marker() -> None:
    assert set(typing.get_type_hints(SpecFields)) == set(typing.get_type_hints(CloneFields)) | {"network"}
    assert "Unpack[SpecFields]" in str(inspect.signature(fixtures.SnapshotFactory.__call__))
    assert "Unpack[CloneFields]" in str(inspect.signature(fixtures.CloneFactory.__call__))
