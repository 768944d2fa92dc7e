"""Hooks that plugins and the rootdir conftest may implement, and the stash keys of this plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_fcvm.clone import Clone
    from pytest_fcvm.errors import FcvmError
    from pytest_fcvm.harness import Harness
    from pytest_fcvm.model.specs import VmSpec
    from pytest_fcvm.options import Options

__all__ = [
    "HARNESS",
    "OPTIONS",
    "RECORDINGS",
    "REPORTER",
    "RUNNING",
    "TIMER",
    "WORKER_SPEC",
    "RunReporter",
    "pytest_fcvm_clone_created",
    "pytest_fcvm_clone_failed",
    "pytest_fcvm_modify_spec",
]


class RunReporter(Protocol):
    """What fixtures need of the part that reports to the user."""

    def shared_dir(self) -> Path:
        """Return the directory that all workers of this run share."""
        ...

    @property
    def owns_shared_dir(self) -> bool:
        """Say whether that directory belongs to this process alone and is removed with it."""
        ...

    def announce(self, text: str) -> None:
        """Show a line of progress."""
        ...

    def add_clone(self, clone: Clone) -> None:
        """Register a clone of this process."""
        ...


OPTIONS: pytest.StashKey[Options] = pytest.StashKey()
HARNESS: pytest.StashKey[Harness] = pytest.StashKey()
REPORTER: pytest.StashKey[RunReporter] = pytest.StashKey()
RECORDINGS: pytest.StashKey[list[Path]] = pytest.StashKey()
RUNNING: pytest.StashKey[pytest.Item | None] = pytest.StashKey()
WORKER_SPEC: pytest.StashKey[VmSpec] = pytest.StashKey()
TIMER: pytest.StashKey[tuple[pytest.Item, Any] | None] = pytest.StashKey()


@pytest.hookspec(firstresult=True)
def pytest_fcvm_modify_spec(spec: VmSpec, item: pytest.Item | None) -> VmSpec | None:
    """Return another spec, or None to leave it as it is.

    Called before a snapshot is looked up, after the markers are merged. `item` is the test that asks, None for session
    fixtures. The first hook that returns a spec wins.
    """


def pytest_fcvm_clone_created(clone: Clone, item: pytest.Item | None) -> None:
    """Called when a clone answers, before the code that asked for it gets it: a fixture, `snapshot.clone()`, `fork`.

    `item` is the running test, None between tests. Calls come one at a time, from the thread that asked for the clone.
    """


def pytest_fcvm_clone_failed(spec: VmSpec, error: FcvmError, item: pytest.Item | None) -> None:
    """Called when a clone did not start, before `error` is raised. `item` is the running test, None between tests."""
