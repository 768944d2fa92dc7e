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
    """Raise HostError where `what` failed by an OSError, with the limit where no file descriptor was left."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            where = f" ({error.filename})" if error.filename else ""
            raise HostError(f"{what} failed: {error.strerror or error}{where}", hint="see `fcvm doctor`") from error
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise HostError(
            f"no file descriptor is left for {what}: {error.strerror}",
            hint=f"raise ulimit -n (it is {soft}, and may be {hard}), or have fewer machines at a time",
        ) from error
