"""Clones that were kept: what a copy needs besides its files so that another process can replay it."""

from __future__ import annotations

import pickle
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

from pytest_fcvm.engine.protocol import Engine, EngineReport, GuestFiles
from pytest_fcvm.errors import HostError
from pytest_fcvm.snapshot.inputs import SnapshotInputs
from pytest_fcvm.store import Entry

__all__ = ["read_inputs", "write_inputs"]

_FILE = "inputs"
_NOT_KEPT = ("engine", "files")  # they hold processes and functions


def write_inputs(inputs: SnapshotInputs, directory: Path) -> None:
    """Write the inputs to a private file: they contain the environment, as the memory file beside them does.

    The functions of the spec are left out: they have run.
    """
    inputs = replace(inputs, spec=replace(inputs.spec, prepare=None, warm=None))
    kept = {field.name: getattr(inputs, field.name) for field in fields(inputs) if field.name not in _NOT_KEPT}
    files = inputs.files.kernel, inputs.files.initramfs, inputs.rootfs
    path = directory / _FILE
    path.touch(mode=0o600)
    path.write_bytes(pickle.dumps((version("pytest-fcvm"), files, kept)))


def read_inputs(entry: Entry, engine: Engine, report: EngineReport) -> SnapshotInputs:
    """Return the inputs of a kept clone, for an engine of this process.

    Raise HostError when another version kept the clone, its image is gone, or the engine or the host differ.
    """
    made_by, files, kept = _read(entry.file(_FILE))
    if made_by != version("pytest-fcvm"):
        raise HostError(f"it was kept by pytest-fcvm {made_by}", hint=f"pip install pytest-fcvm=={made_by}")
    inputs = SnapshotInputs(**kept, files=files, engine=engine)
    if not inputs.rootfs.exists():
        raise HostError(f"the file system of {inputs.spec.image} has been removed", hint="run the test again")
    if difference := _difference(inputs.report, report):
        raise HostError(f"it was kept on another host or engine: {difference}", hint="run the test again")
    return inputs


class _Values(pickle.Unpickler):
    """Unpickle our own data classes alone: a cache may come from elsewhere, as the artifact of a CI job."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of our data classes or enumerations, or a path. Raise UnpicklingError for everything else."""
        if (module, name) == ("builtins", "getattr"):
            return _member
        if module == "pathlib" or module.startswith(f"{__package__.partition('.')[0]}."):
            found = super().find_class(module, name)
            if isinstance(found, type) and (is_dataclass(found) or issubclass(found, (Enum, PurePath))):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} does not belong there")


def _member(kind: Any, name: str) -> Enum:
    """Return a member of an enumeration: Python before 3.11.4 pickles those as attributes of their class."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind[name]
    raise pickle.UnpicklingError(f"an attribute {name} does not belong there")


def _read(path: Path) -> tuple[str, GuestFiles, dict[str, Any]]:
    try:
        with path.open("rb") as file:
            made_by, (kernel, initramfs, rootfs), kept = _Values(file).load()
            return made_by, GuestFiles(kernel=kernel, initramfs=initramfs, rootfs=rootfs), kept
    except (
        OSError,
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        ImportError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        raise HostError(f"{path} cannot be read: {error}", hint="run the test again") from error


def _difference(kept: EngineReport, now: EngineReport) -> str:
    """Return the first difference of two engines, "" where a clone of one runs on the other."""
    before: dict[str, Any] = {"engine": kept.engine, **kept.identity}
    after: dict[str, Any] = {"engine": now.engine, **now.identity}
    names = (name for name in before if before[name] != after.get(name))
    return next((f"{name} was {before[name]}, is {after.get(name)}" for name in names), "")
