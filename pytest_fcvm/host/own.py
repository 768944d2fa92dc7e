"""What a test can neither patch nor move: the calls, the tools and the environment that were there when pytest began.

Tests put fakes in the place of `os.open`, `shutil.which` or `subprocess.Popen`, and clear or move `os.environ`, for as
long as one of them runs, and clones are started, used and ended meanwhile. What needs one of these takes it from here.
pytest itself imports these modules, so that a run without a clone pays nothing for them.
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
    "take_environment",
]

_taken: list[Mapping[str, str]] = []  # of the sessions of this process: a test may run one inside another's


def take_environment() -> Callable[[], None]:
    """Let `environment` be what it is now, until what is returned is called."""
    taken = MappingProxyType(dict(os.environ))
    _taken.append(taken)

    def give_back() -> None:
        _taken[:] = [other for other in _taken if other is not taken]

    return give_back


def environment() -> Mapping[str, str]:
    """Return the environment with which the session began, that of now where there is no session."""
    return _taken[-1] if _taken else os.environ


def find_program(name: str) -> str | None:
    """Return the path of a program on the PATH with which the session began, or None."""
    return shutil.which(name, path=environment().get("PATH", os.defpath))


def expand_home(path: str) -> str:
    """Return a path in which a leading `~/` is the home directory with which the session began."""
    home = environment().get("HOME", "")
    return f"{home}{path[1:]}" if home and (path == "~" or path.startswith("~/")) else path


def check_owner(owner: int) -> None:
    """Raise UsageProblem in a process that a test has forked: `owner` is the one that has started the clones.

    The threads that serve the clones are not in a forked process, which would wait for them until its deadline.
    """
    if getpid() != owner:
        raise UsageProblem(
            "a forked process can neither use nor start clones: they belong to the pytest process that has begun to",
            hint="take @pytest.mark.forked from the test, or --forked from the command line; "
            "a child of os.fork leaves clones to its parent",
        )
