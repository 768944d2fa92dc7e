"""The on-disk cache: entries of a kind under a key, built once per host, checked before use, never changed.

An entry is a directory of files with `manifest.json`, written last. It is made in a temporary directory, synced and renamed,
under a lock per key that all processes of the host respect. Beside the lock lies a note of who builds and how far.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import hmac
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_fcvm.errors import HostError
from pytest_fcvm.host.files import SEALED, replace_file, sync_directory, sync_path
from pytest_fcvm.host.own import getpid, os, shutil

__all__ = ["MANIFEST_SCHEMA", "Collection", "Entry", "Store", "canonical_digest", "content_digest"]

MANIFEST_SCHEMA = 1
_MANIFEST = "manifest.json"
_BLOCK = 64 * 1024
_POLL_S = 0.05  # filelock has no wait that the kernel ends; this bounds how late a waiter notices
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A finished entry. `facts` is what its builder wanted to remember."""

    path: Path
    key: str
    facts: Mapping[str, Any]

    def file(self, name: str) -> Path:
        """Return the path of one of the entry's files."""
        return self.path / name

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the entry from being removed or replaced, and note that it was wanted."""
        # The directory's own inode: the manifest is replaced when a copied or touched entry is proven anew.
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            with suppress(OSError):
                os.utime(descriptor)
            yield
        finally:
            os.close(descriptor)

    @property
    def used_s(self) -> float:
        """Return when it was last wanted, in seconds since 1970."""
        return self.path.stat().st_mtime

    @property
    def size_bytes(self) -> int:
        """Return what it takes on disk; holes take nothing."""
        return sum(path.lstat().st_blocks for path in self.path.iterdir()) * 512


@dataclass(kw_only=True)
class Collection:
    """All entries of one kind. `note` is told, in a sentence, of anything a person should know."""

    path: Path
    note: Note = field(default=lambda _text: None)
    _held: set[str] = field(default_factory=set)

    def find(self, key: str) -> Entry | None:
        """Return the entry if it is there and sound.

        One that is not is put aside, with a note, by the holder of the key's lock: without it, the entry that is moved
        away could be the one that another process has just built.
        """
        directory = self.path / key
        try:
            manifest = json.loads((directory / _MANIFEST).read_bytes())
            fault = _fault(directory, manifest, key)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            fault = f"its manifest is not readable ({error})"
            manifest = {}
        if fault:
            if key in self._held:
                self._quarantine(directory, fault)
            return None
        return Entry(path=directory, key=key, facts=manifest["facts"])

    def entries(self) -> list[Entry]:
        """Return all entries with a readable manifest, unproven, those that were wanted last first."""
        found = []
        for directory in self.path.iterdir():
            with suppress(OSError, ValueError, KeyError, TypeError):
                manifest = json.loads((directory / _MANIFEST).read_bytes())
                if manifest["key"] == directory.name:
                    found.append(Entry(path=directory, key=directory.name, facts=manifest["facts"]))
        return sorted(found, key=lambda entry: entry.used_s, reverse=True)

    def is_in_use(self, key: str) -> bool:
        """Say whether a process holds the entry in use."""
        try:
            descriptor = os.open(self.path / key, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def remove(self, key: str) -> bool:
        """Remove an entry unless somebody uses it; return whether it is gone. The key's lock must be held."""
        if self.is_in_use(key):
            return False
        shutil.rmtree(self._quarantine(self.path / key, ""), ignore_errors=True)
        return True

    def verify(self, key: str) -> str:
        """Hash an entry's files again, whatever their stamps say. Return "" or the fault; an unsound one is put aside.

        The key's lock must be held.
        """
        directory = self.path / key
        try:
            manifest = json.loads((directory / _MANIFEST).read_bytes())
            for known in manifest["files"].values():
                known["stamp"] = [0, 0, known["stamp"][2], 0, 0]
            fault = _fault(directory, {**manifest, "seal": _seal(manifest)}, key)
        except (OSError, ValueError, KeyError, TypeError) as error:
            fault = f"its manifest is not readable ({error})"
        if fault:
            self._quarantine(directory, "")
        return fault

    @contextmanager
    def locked(self, key: str, who: str, waiting: Note) -> Iterator[Note]:
        """Hold the key's lock. Yield the function that notes the builder's phase; tell `waiting` whom we wait for.

        There is no lock where nothing can be written, and nothing to lock: entries that are there can be used.
        """
        from filelock import FileLock, Timeout  # 0.07 s to import, and only builds need it

        lock = FileLock(self.path / f"{key}.lock", mode=0o600, thread_local=False)
        state, told = self.path / f"{key}.builder", ""
        while not lock.is_locked:
            try:
                lock.acquire(timeout=0.5, poll_interval=_POLL_S)
            except Timeout:
                told = _tell(waiting, _read_builder(state), told)
            except OSError as error:
                if error.errno not in SEALED:
                    raise
                break
            except Exception as error:  # whatever a fake of os.open does to a library that uses it
                what = f"the lock {lock.lock_file} cannot be taken: {type(error).__name__}: {error}"
                raise HostError(what, hint="start a clone before a test replaces os.open") from error
        if lock.is_locked:
            self._held.add(key)
        try:
            yield lambda phase: _write_builder(state, who, phase)
        finally:
            self._held.discard(key)
            try:
                with suppress(OSError):
                    state.unlink()
            finally:
                lock.release()

    @contextmanager
    def scratch(self, otherwise: Path | None = None) -> Iterator[Path]:
        """Yield a directory that is gone after the block, and by the next start where the process was killed in it.

        It lies in `otherwise` where nothing can be written here.
        """
        key = f"copy-{os.urandom(8).hex()}"
        with self.locked(key, "a copy", lambda _text: None):
            place = self.path if key in self._held or otherwise is None else otherwise
            directory = place / f"{key}.tmp-{getpid()}"
            try:
                directory.mkdir(mode=0o700)
                yield directory
            finally:
                shutil.rmtree(directory, ignore_errors=True)
                with suppress(OSError):
                    (self.path / f"{key}.lock").unlink()

    def build(self, key: str, make: Callable[[Path], Mapping[str, Any]]) -> Entry:
        """Let `make` fill a directory and return the facts, then publish it. The key's lock must be held.

        Raise HostError naming the directory when the disk is full, or when another run uses the entry that would be
        replaced; nothing is left of an entry that failed.
        """
        self._check_replaceable(key)
        self._sweep_key(key)
        directory = self.path / f"{key}.tmp-{getpid()}"
        try:
            _make_dir(directory)
            facts = dict(make(directory))
            _write_manifest(directory, key, facts)
            sync_directory(directory)
            final = self.path / key
            self._check_replaceable(key)
            if final.exists():
                shutil.rmtree(self._quarantine(final, ""), ignore_errors=True)
            directory.rename(final)
            sync_path(self.path)
        except BaseException as error:
            shutil.rmtree(directory, ignore_errors=True)
            _raise_if_full(error, directory)
            raise
        return Entry(path=final, key=key, facts=facts)

    def _check_replaceable(self, key: str) -> None:
        if self.is_in_use(key):
            raise HostError(
                f"cache entry {key[:12]} cannot be replaced: another run uses it",
                hint="leave out --fcvm-rebuild, or wait until that run has ended",
            )

    def _sweep_key(self, key: str) -> None:
        for directory in self.path.glob(f"{key}.tmp-*"):
            shutil.rmtree(directory, ignore_errors=True)

    def _quarantine(self, directory: Path, fault: str) -> Path:
        aside = self.path / f"{directory.name}.bad-{os.urandom(4).hex()}"
        with suppress(OSError):
            for old in self.path.glob(f"{directory.name}.bad-*"):
                shutil.rmtree(old, ignore_errors=True)
            directory.rename(aside)
        if fault:
            self.note(f"cache entry {directory.name[:12]} is put aside and built anew: {fault} ({aside})")
        return aside


class Store:
    """The cache directory of one user."""

    def __init__(self, root: Path, note: Note = lambda _text: None) -> None:
        self.root = root
        self._note = note

    def collection(self, kind: str) -> Collection:
        """Return the shelf of a kind (images, kernels, snapshots), made when it is first asked for."""
        return Collection(path=self.directory(kind), note=self._note)

    def directory(self, name: str) -> Path:
        """Return a directory of the store that manages its own content."""
        path = self.root / name
        if not path.is_dir():
            with suppress(FileExistsError):
                _make_dir(path)
        return path

    def hidden_digest(self, value: Mapping[str, Any]) -> str:
        """Return an HMAC of values that must not be guessable from a key or a manifest: environment, metadata."""
        return hmac.new(self._secret(), _canonical(dict(value)), hashlib.sha256).hexdigest()

    def _secret(self) -> bytes:
        path = self.root / "secret"
        with suppress(FileNotFoundError):
            return path.read_bytes()
        with suppress(FileExistsError):
            fresh = self.root / f"secret.{getpid()}.{os.urandom(4).hex()}"
            fresh.touch(mode=0o600)
            fresh.write_bytes(os.urandom(32))
            try:
                os.link(fresh, path)
            finally:
                fresh.unlink()
        return path.read_bytes()


def canonical_digest(parts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of canonical JSON (sorted keys, no spaces) as 64 hex digits."""
    return hashlib.sha256(_canonical(parts)).hexdigest()


def content_digest(path: Path) -> str:
    """Return a SHA-256 over (offset, bytes) of each 64 KiB block of a file that is not all zeros."""
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    zeros = bytes(_BLOCK)
    with path.open("rb", buffering=0) as file:
        position = 0
        while (position := _next_data(file.fileno(), position)) >= 0:
            position -= position % _BLOCK
            file.seek(position)
            block = file.read(_BLOCK)
            if block and block != zeros[: len(block)]:
                digest.update(position.to_bytes(8, "little"))
                digest.update(block)
            position += _BLOCK
    return digest.hexdigest()


def _next_data(descriptor: int, position: int) -> int:
    try:
        return os.lseek(descriptor, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return -1
        raise


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _write_manifest(directory: Path, key: str, facts: Mapping[str, Any]) -> None:
    files = {
        path.name: {"sha256": content_digest(path), "stamp": _stamp(path)}
        for path in sorted(directory.iterdir())
        if path.is_file() and not path.is_symlink()
    }
    _replace_manifest(directory, {"schema": MANIFEST_SCHEMA, "key": key, "facts": facts, "files": files})


def _replace_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    sealed = {**manifest, "seal": _seal(manifest)}
    replace_file(directory / _MANIFEST, json.dumps(sealed, indent=1, sort_keys=True))


def _seal(manifest: Mapping[str, Any]) -> str:
    return canonical_digest({name: value for name, value in manifest.items() if name != "seal"})


def _fault(directory: Path, manifest: Mapping[str, Any], key: str) -> str:
    if manifest["schema"] != MANIFEST_SCHEMA or manifest["key"] != key:
        return "it is from another version"
    if manifest["seal"] != _seal(manifest):
        return f"{_MANIFEST} has changed"
    changed = False
    for name, known in manifest["files"].items():
        try:
            stamp = _stamp(directory / name)
        except FileNotFoundError:
            return f"{name} is missing"
        if stamp != known["stamp"]:
            if stamp[2] != known["stamp"][2] or content_digest(directory / name) != known["sha256"]:
                return f"{name} has changed"
            known["stamp"], changed = stamp, True
    if changed:
        with suppress(OSError):  # no room for it: the entry is sound all the same, and is hashed again next time
            _replace_manifest(directory, manifest)
    return ""


def _make_dir(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True)
    except OSError as error:
        if error.errno in SEALED:
            raise HostError(
                f"the cache lacks what this run needs, and cannot take it: {path}: {error.strerror}",
                hint="make it writable, or name another --fcvm-cache-dir",
            ) from error
        raise


def _raise_if_full(error: BaseException, directory: Path) -> None:
    if isinstance(error, OSError) and error.errno in _FULL:
        raise HostError(
            f"no room left in {directory.parent}: {error.strerror}",
            hint="free some disk or name another --fcvm-cache-dir",
        ) from error


def _write_builder(path: Path, who: str, phase: str) -> None:
    with suppress(OSError):
        replace_file(path, json.dumps({"pid": getpid(), "who": who, "phase": phase}))


def _read_builder(path: Path) -> str:
    try:
        builder = json.loads(path.read_text())
        return f"waiting for pid {builder['pid']} ({builder['who']}): {builder['phase']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "waiting for another build"


def _tell(waiting: Note, text: str, told: str) -> str:
    if text != told:
        waiting(text)
    return text
