"""What failed once in a run is not tried again in it, by no worker: every later test is told the same at once."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pytest_fcvm.errors import FcvmError
from pytest_fcvm.host.own import getpid

__all__ = ["Failures", "plain_message"]

T = TypeVar("T")

_AGAIN = " (failed before in this run)"


def plain_message(error: FcvmError) -> str:
    """Return what an error says without the remark that it has been said before."""
    return error.message.removesuffix(_AGAIN)


class Failures:
    """The failures of a run, kept in a private directory that its processes share."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def check(self, name: str) -> None:
        """Raise what `once` has recorded under a name, in this process or in another worker of the run."""
        with suppress(OSError, pickle.UnpicklingError, EOFError):
            known: FcvmError = pickle.loads(self._record(name).read_bytes())  # noqa: S301  in a private directory
            known.message = f"{plain_message(known)}{_AGAIN}"
            known.args = (known.message,)
            known.evidence = {}
            raise known

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Call `make` unless it failed before in this run. Under a lock of all workers, it is called once."""
        self.check(name)
        try:
            return make()
        except FcvmError as error:
            with suppress(OSError):  # no room for it: the next test tries once more
                fresh = self._directory / f"{name}.{getpid()}"
                fresh.write_bytes(pickle.dumps(error))
                fresh.replace(self._record(name))
            raise

    def _record(self, name: str) -> Path:
        return self._directory / f"failed-{name}"
