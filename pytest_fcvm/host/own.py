"""What no test can patch: names of our own for system calls that tests replace, and who started what."""

from __future__ import annotations

from posix import getpid

from pytest_fcvm.errors import UsageProblem

__all__ = ["check_owner", "getpid"]


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
