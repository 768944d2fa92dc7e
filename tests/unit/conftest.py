"""What all unit tests share."""

from __future__ import annotations

import pytest

from pytest_fcvm.host import own


@pytest.fixture(autouse=True)
def _environment_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let parts see the environment that a test makes, as they do without a pytest session around them."""
    monkeypatch.setattr(own, "_captured", [])
