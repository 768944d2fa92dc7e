"""What the tests of networking share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pytest_fcvm.host.paths import RunDir
from pytest_fcvm.host.supervisor.supervisor import Child, Supervisor


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    with RunDir() as run, Supervisor.start(run.path) as supervisor:
        yield supervisor


@pytest.fixture
def children(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> list[Child]:
    """The processes that the supervisor has started since."""
    spawn, children = supervisor.spawn, []

    def record(*arguments: Any, **named: Any) -> Child:
        children.append(spawn(*arguments, **named))
        return children[-1]

    monkeypatch.setattr(supervisor, "spawn", record)
    return children
