"""Directories on this host: the cache, which is permanent, and run directories, which are removed with their process.

Run directories are local and private, and their paths are short: a Unix socket's path has at most 107 characters.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from pytest_fcvm.errors import FcvmError, HostError
from pytest_fcvm.host.own import environment, expand_home, getpid, os, shutil

__all__ = [
    "LOCK_NAME",
    "PATH_LIMIT",
    "RunDir",
    "cache_root",
    "file_system_of",
    "is_run_id",
    "make_child_dir",
    "package_dir",
    "run_root",
    "working_dir",
]

PATH_LIMIT = 100
LOCK_NAME = "lock"

_ROOT_LIMIT = 45  # characters; PATH_LIMIT leaves the rest for /<run id>/<child's directory>/<file>
_CHILD_NAME_LIMIT = 20
_REMOTE = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "glusterfs", "fuse.sshfs"})
_MOUNTS = Path("/proc/self/mountinfo")
# Not tempfile.gettempdir(): all runs of a user must use the same one, and TMPDIR may be long.
_TMP = Path("/tmp")  # noqa: S108 - the owner and the mode of our directory there are verified
_RUN_ID = re.compile(r"[0-9a-f]{8}")
_UNFIT = re.compile(r"[^A-Za-z0-9_.-]+")


def cache_root(option: Path | None, *, mounts: Path = _MOUNTS) -> Path:
    """Return the cache directory: `option`, else `$XDG_CACHE_HOME/pytest-fcvm`. Create it with mode 0700 if missing.

    Raise HostError when it cannot be made, is on a network file system (where locks and shared pages do not work),
    belongs to another user, or is readable by others: memory images hold environment values in clear.
    """
    root = option if option is not None else _default_cache_root()
    hint = "name another directory with --fcvm-cache-dir"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = root.stat()
        if found.st_uid == os.geteuid() and found.st_mode & 0o077 and not any(root.iterdir()):
            root.chmod(0o700)
            found = root.stat()
    except OSError as error:
        raise HostError(f"the cache directory {root} cannot be used: {error.strerror}", hint=hint) from error
    if found.st_uid != os.geteuid():
        raise HostError(f"the cache directory {root} belongs to another user (uid {found.st_uid})", hint=hint)
    if found.st_mode & 0o077:
        raise HostError(f"the cache directory {root} is open to other users", hint=f"chmod 700 {root}, or {hint}")
    kind = file_system_of(root, mounts=mounts)
    if kind in _REMOTE:
        raise HostError(f"the cache directory {root} is on a network file system ({kind})", hint=hint)
    return root.resolve()


def file_system_of(path: Path, *, mounts: Path = _MOUNTS) -> str:
    """Return the type of the file system that holds `path`, "" when unknown.

    `mounts` has the format of /proc/self/mountinfo (proc_pid_mountinfo(5)): the third field is the device, and the type
    follows a separate hyphen. Compare devices, so that bind mounts and symlinks do not matter.
    """
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError):
        for line in mounts.read_text(errors="surrogateescape").splitlines():
            before, _, after = line.partition(" - ")
            if wanted in before.split()[2:3]:
                return after.split()[0]
    return ""


def run_root(tmp: Path = _TMP) -> Path:
    """Return the parent of this user's run directories: `$XDG_RUNTIME_DIR/fcvm` if usable, else `/tmp/fcvm-<uid>`.

    Raise HostError when the path is not a private directory of this user.
    """
    given = environment().get("XDG_RUNTIME_DIR", "")
    if given.startswith("/"):
        candidate = Path(given) / "fcvm"
        with suppress(OSError, HostError):
            if len(str(candidate)) <= _ROOT_LIMIT:
                return _private_dir(candidate)
    fallback = tmp / f"fcvm-{os.geteuid()}"
    try:
        return _private_dir(fallback)
    except OSError as error:
        raise HostError(f"{fallback} cannot be made: {error.strerror}", hint="set XDG_RUNTIME_DIR") from error


class RunDir:
    """One process's directory under the run root, created on entry and removed on exit.

    Its `lock` file is locked by flock as long as the directory is in use; the janitor relies on nothing else. In a
    forked child, exit does nothing: the directory is the parent's.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._root = root
        self._owner = getpid()
        self._lock = -1
        self._path: Path | None = None

    @property
    def path(self) -> Path:
        """Return the directory. Raise FcvmError before entry."""
        if self._path is None:
            raise FcvmError("the run directory is not open")
        return self._path

    def __enter__(self) -> Self:
        root = self._root if self._root is not None else run_root()
        self._path, self._lock = _claim(root, lambda: os.urandom(4).hex())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if getpid() == self._owner and self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)


def working_dir() -> Path:
    """Return the working directory. Where it was removed, return a path below which nothing exists."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return Path("/proc/self/cwd")


def is_run_id(name: str) -> bool:
    """Say whether a directory of this name may be a run directory."""
    return bool(_RUN_ID.fullmatch(name))


def make_child_dir(parent: Path, name: str, serial: int) -> Path:
    """Create a private directory with a new name. The caller passes each `serial` once.

    `name` may hold any text; it is shortened, and unsafe characters are replaced. Raise HostError.
    """
    fit = _UNFIT.sub("-", name).strip(".-")[:_CHILD_NAME_LIMIT] or "child"
    path = parent / f"{fit}.{serial}"
    try:
        path.mkdir(mode=0o700)
    except OSError as error:
        raise HostError(
            f"{path} cannot be made: {error.strerror}", hint="free space there or set XDG_RUNTIME_DIR"
        ) from error
    return path


def _default_cache_root() -> Path:
    base = environment().get("XDG_CACHE_HOME", "")
    if base.startswith("/"):  # the XDG base directory specification says to ignore a relative path
        return Path(base) / "pytest-fcvm"
    try:
        return Path(expand_home("~")).expanduser() / ".cache" / "pytest-fcvm"
    except RuntimeError as error:
        raise HostError(f"there is no home directory: {error}", hint="set HOME or --fcvm-cache-dir") from error


def _private_dir(path: Path) -> Path:
    """Create a private directory, or accept an existing one: not a symlink, our own, and not open to others."""
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise HostError(
            f"{path} is not a private directory of this user",
            hint=f"remove {path}, or set XDG_RUNTIME_DIR to a directory of your own",
        )
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return path


def _claim(root: Path, pick_name: Callable[[], str]) -> tuple[Path, int]:
    """Create a new directory and lock it. Try another name if a janitor removed it between the two steps."""
    while True:
        path = root / pick_name()
        try:
            path.mkdir(mode=0o700)
            lock = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except (FileExistsError, FileNotFoundError):
            if not root.is_dir():
                raise HostError(f"{root} is gone", hint="set XDG_RUNTIME_DIR to a directory that stays") from None
            continue
        except OSError as error:
            with suppress(OSError):
                path.rmdir()
            raise HostError(f"{path} cannot be made: {error.strerror}", hint="set XDG_RUNTIME_DIR") from error
        try:
            if _holds(lock, path / LOCK_NAME):
                return path, lock
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
            raise
        os.close(lock)


def _holds(lock: int, path: Path) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def package_dir(name: str) -> Path | None:
    """Return the directory of a top-level package that may be installed, without importing it."""
    found = importlib.util.find_spec(name)
    places = list(found.submodule_search_locations or ()) if found else []
    return Path(places[0]) if places else None
