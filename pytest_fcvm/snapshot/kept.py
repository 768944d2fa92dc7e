"""Clones that outlive their test: what a copy needs besides its own files to be brought back by another process."""

from __future__ import annotations

import pickle
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pytest_fcvm.engine.protocol import Engine, EngineReport, GuestFiles
from pytest_fcvm.errors import HostError
from pytest_fcvm.snapshot.ingredients import Ingredients
from pytest_fcvm.store import Entry

__all__ = ["read_ingredients", "write_ingredients"]

_FILE = "ingredients"
_NOT_KEPT = "engine"  # it holds processes


def write_ingredients(parts: Ingredients, folder: Path) -> None:
    """Write a file, as private as the memory beside it: the environment is in both.

    The functions of the spec are left out, they have done their work.
    """
    files = GuestFiles(kernel=parts.files.kernel, initramfs=parts.files.initramfs, rootfs=parts.rootfs)
    parts = replace(parts, spec=replace(parts.spec, prepare=None, warm=None), files=files)
    kept = {field.name: getattr(parts, field.name) for field in fields(parts) if field.name != _NOT_KEPT}
    path = folder / _FILE
    path.touch(mode=0o600)
    path.write_bytes(pickle.dumps((version("pytest-fcvm"), kept)))


def read_ingredients(entry: Entry, engine: Engine, report: EngineReport) -> Ingredients:
    """Return what a kept clone was made of, to be run by an engine of this process.

    Raise HostError when another version kept it, its image is gone, or the engine or the host are not the same.
    """
    # An entry belongs to its user, mode 0700 around it: nobody else could have written this.
    made_by, kept = pickle.loads(entry.file(_FILE).read_bytes())  # noqa: S301
    if made_by != version("pytest-fcvm"):
        raise HostError(f"it was kept by pytest-fcvm {made_by}", hint=f"pip install pytest-fcvm=={made_by}")
    parts = Ingredients(**kept, engine=engine)
    if not parts.rootfs.exists():
        raise HostError(f"the file system of {parts.spec.image} has been removed", hint="run the test again")
    if difference := _difference(parts.report, report):
        raise HostError(f"it was kept on another machine or engine: {difference}", hint="run the test again")
    return parts


def _difference(kept: EngineReport, now: EngineReport) -> str:
    """Return the first thing by which two engines differ, "" where a machine of one runs on the other."""
    before: dict[str, Any] = {"engine": kept.engine, **kept.identity}
    after: dict[str, Any] = {"engine": now.engine, **now.identity}
    names = (name for name in before if before[name] != after.get(name))
    return next((f"{name} was {before[name]}, is {after.get(name)}" for name in names), "")
