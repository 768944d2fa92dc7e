"""Failures of a run: what failed once is not tried again; every later test fails at once with the same error."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pytest_fcvm.errors import FcvmError
from pytest_fcvm.host.files import replace_file

__all__ = ["Failures", "plain_message"]

T = TypeVar("T")

_AGAIN = " (failed before in this run)"


def plain_message(error: FcvmError) -> str:
    """Return an error's message without the remark that the same failed before in this run."""
    return error.message.removesuffix(_AGAIN)


class Failures:
    """The failures of a run, kept in a private directory that its processes share."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def check(self, name: str) -> None:
        """Raise the error that `once` has recorded under a name, in this process or in another worker of the run."""
        try:
            known: FcvmError = pickle.loads(self._record(name).read_bytes())  # noqa: S301  in a private directory
        except (OSError, pickle.UnpicklingError, EOFError):
            return
        known.message = f"{plain_message(known)}{_AGAIN}"
        known.args = (known.message,)
        known.evidence = {}
        raise known

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Return what `make` returns, unless it failed before in this run: then raise that error.

        Hold a lock that all workers respect, so that `make` is called once.
        """
        self.check(name)
        try:
            return make()
        except FcvmError as error:
            with suppress(OSError):  # the disk is full: the next test tries again
                replace_file(self._record(name), pickle.dumps(error))
            raise

    def _record(self, name: str) -> Path:
        return self._directory / f"failed-{name}"
