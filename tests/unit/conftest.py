"""What all unit tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from pytest_fcvm.host import own


@pytest.fixture(autouse=True)
def _environment_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let parts see the environment that a test makes, as they do without a pytest session around them."""
    monkeypatch.setattr(own, "_captured", [])


@pytest.fixture(scope="session", autouse=True)
def _no_tools_wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hide an installed wheel of tools: tests put programs of their own on PATH, also for processes that they start."""
    shadow = tmp_path_factory.mktemp("shadow")
    (shadow / "pytest_fcvm_tools_x86_64").mkdir()
    (shadow / "pytest_fcvm_tools_x86_64" / "__init__.py").touch()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(shadow)
        monkeypatch.setenv("PYTHONPATH", str(shadow), prepend=os.pathsep)
        yield
