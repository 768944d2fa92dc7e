"""What no test can patch: `os.getpid` is a name that tests of daemons replace, the system call is not."""

from __future__ import annotations

from posix import getpid

__all__ = ["getpid"]
