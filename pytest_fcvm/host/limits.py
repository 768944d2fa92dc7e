"""Turn an OSError at a limit of this host into an error that says which limit, and how to raise it."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pytest_fcvm.errors import FcvmError, HostError
from pytest_fcvm.host.files import READ_ONLY_ERRORS

__all__ = ["host_error", "lacks_processes", "process_limit_hint", "translating_emfile"]

_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_THREAD = "can't start new thread"
# What Python, C libraries, Go and shells print when the kernel gives them no thread or process.
_NO_PROCESS = re.compile(
    r"can't start new thread|newosproc|failed to create new OS thread|pthread_create|thread_create|[Cc]annot fork|"
    r"BlockingIOError.*Resource temporarily unavailable"
)
_PLACES = "the run directory (XDG_RUNTIME_DIR) and the cache (--fcvm-cache-dir)"


@contextmanager
def translating_emfile(what: str) -> Iterator[None]:
    """Raise HostError when `what` fails with an OSError, or because no thread can start. The hint says what to do."""
    try:
        yield
    except FcvmError:  # GuestTimeout is an OSError too
        raise
    except OSError as error:
        raise host_error(what, error) from error
    except RuntimeError as error:
        if _NO_THREAD not in str(error):
            raise
        raise HostError(f"no thread is left for {what}: {error}", hint=process_limit_hint()) from error


def host_error(what: str, error: OSError) -> HostError:
    """Return the HostError for an OSError that ended `what`."""
    reason = error.strerror or str(error)
    named = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else ""
    where = f" ({named})" if named else ""
    if error.errno in _DESCRIPTORS:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return HostError(
            f"no file descriptor is left for {what}: {reason}",
            hint=f"raise ulimit -n (it is {soft}, and may be {hard}), or run fewer clones at a time",
        )
    if error.errno in _FULL:
        place = Path(named).parent if named else _PLACES
        return HostError(
            f"no room is left for {what}: {reason}{where}",
            hint=f"free space or inodes in {place} (df -h, df -i), or name other directories",
        )
    if error.errno == errno.EAGAIN:
        return HostError(f"no process is left for {what}: {reason}{where}", hint=process_limit_hint())
    if error.errno in READ_ONLY_ERRORS:
        return HostError(
            f"{what} failed: {reason}{where}", hint=f"make it writable; {_PLACES} must be in directories of your own"
        )
    return HostError(f"{what} failed: {reason}{where}", hint="see `fcvm doctor`")


def lacks_processes(output: str) -> bool:
    """Say whether a program's output reports that the kernel gave it no thread or process."""
    return bool(_NO_PROCESS.search(output))


def process_limit_hint() -> str:
    """Return the hint for a host without another thread or process."""
    soft, hard = (
        "unlimited" if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NPROC)
    )
    return f"raise ulimit -u (it is {soft}, and may be {hard}) or the pids limit of the container, or run fewer workers"
