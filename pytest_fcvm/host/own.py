"""Our own copies of functions and of the environment, which a test cannot patch.

Tests replace `os.open`, `shutil.which` or `subprocess.Popen`, and clear or change `os.environ`, and clones start and
end meanwhile. Import such functions from here. pytest imports the same modules, so a run without a clone pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import getpid
from socket import socket as Socket  # noqa: N812 - a class
from time import CLOCK_MONOTONIC, CLOCK_MONOTONIC_RAW, clock_gettime, clock_gettime_ns
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING

from pytest_fcvm.errors import UsageProblem

if TYPE_CHECKING:
    import os
    import shutil
    import subprocess
else:
    import os as _os
    import shutil as _shutil
    import subprocess as _subprocess

    os, shutil, subprocess = (SimpleNamespace(**vars(module)) for module in (_os, _shutil, _subprocess))

__all__ = [
    "CLOCK_MONOTONIC",
    "CLOCK_MONOTONIC_RAW",
    "Socket",
    "capture_environment",
    "check_owner",
    "clock_gettime",
    "clock_gettime_ns",
    "environment",
    "expand_home",
    "find_program",
    "getpid",
    "os",
    "shutil",
    "subprocess",
]

_captured: list[Mapping[str, str]] = []  # one for each session of this process: a test may run a session inside another


def capture_environment() -> Callable[[], None]:
    """Make `environment` return the environment of this moment, until the returned function is called."""
    captured = MappingProxyType(dict(os.environ))
    _captured.append(captured)

    def release() -> None:
        _captured[:] = [other for other in _captured if other is not captured]

    return release


def environment() -> Mapping[str, str]:
    """Return the environment in which the session began, or the current one outside a session."""
    return _captured[-1] if _captured else os.environ


def find_program(name: str) -> str | None:
    """Return the path of a program on the PATH of `environment`, or None."""
    return shutil.which(name, path=environment().get("PATH", os.defpath))


def expand_home(path: str) -> str:
    """Replace a leading `~/` by the home directory of `environment`."""
    home = environment().get("HOME", "")
    return f"{home}{path[1:]}" if home and (path == "~" or path.startswith("~/")) else path


def check_owner(owner: int) -> None:
    """Raise UsageProblem in a forked process: `owner` is the id of the process that owns the clones.

    A forked process lacks the threads that serve the clones, and would wait for them until its deadline.
    """
    if getpid() != owner:
        raise UsageProblem(
            "a forked process can neither use nor start clones: clones belong to the pytest process that started one",
            hint="remove @pytest.mark.forked from the test, or --forked from the command line; "
            "do not use clones in a child of os.fork",
        )
