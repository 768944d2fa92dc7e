"""The limits of a process, told as what they are to a person."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager

from pytest_fcvm.errors import HostError

__all__ = ["descriptors_told"]


@contextmanager
def descriptors_told(what: str) -> Iterator[None]:
    """Raise HostError where `what` failed because no file descriptor was left, in this process or on the host."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise HostError(
            f"no file descriptor is left for {what}: {error.strerror}",
            hint=f"raise ulimit -n (it is {soft}, and may be {hard}), or have fewer machines at a time",
        ) from error
