"""The on-disk cache: collections of entries, each under a key, built once per host, checked before use, never changed.

An entry is a directory of files with a `manifest.json`, which is written last. A build fills a temporary directory,
syncs it and renames it, under a lock per key that all processes of the host respect. A file beside the lock says who
builds, and which phase the build is in.
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
from pytest_fcvm.host.files import READ_ONLY_ERRORS, replace_file, stamp_of, sync_directory, sync_path
from pytest_fcvm.host.own import getpid, os, shutil
from pytest_fcvm.model.results import Progress

__all__ = ["MANIFEST_SCHEMA", "Collection", "Entry", "Store", "canonical_digest", "content_digest"]

MANIFEST_SCHEMA = 3
_MANIFEST = "manifest.json"
_BLOCK = 64 * 1024
_POLL_S = 0.05  # filelock polls; this limits how late a waiter notices a free lock
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A finished entry. `facts` are the builder's own fields in the manifest."""

    path: Path
    key: str
    facts: Mapping[str, Any]

    def file(self, name: str) -> Path:
        """Return the path of one of the entry's files."""
        return self.path / name

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the entry from being removed or replaced, and set the time of its last use."""
        # Lock the directory's inode: the manifest is replaced when a copied or touched entry is hashed again.
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
        """Return the time of the last use, in seconds since 1970."""
        return self.path.stat().st_mtime

    @property
    def size_bytes(self) -> int:
        """Return the space that the entry takes on disk; holes take none."""
        return sum(path.lstat().st_blocks for path in self.path.iterdir()) * 512


@dataclass(kw_only=True)
class Collection:
    """All entries of one kind. `note` is called with a sentence for the user, such as a damaged entry."""

    path: Path
    note: Progress = field(default=lambda _text: None)
    _held: set[str] = field(default_factory=set)

    def find(self, key: str) -> Entry | None:
        """Return the entry if it exists and is valid.

        Quarantine an invalid one, with a note, if this process holds the key's lock. Without the lock, this could
        quarantine an entry that another process has just built.
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
        """Return all entries with a readable manifest, the last used first. Do not verify them."""
        found = []
        for directory in self.path.iterdir():
            with suppress(OSError, ValueError, KeyError, TypeError):
                manifest = json.loads((directory / _MANIFEST).read_bytes())
                if manifest["key"] == directory.name:
                    found.append(Entry(path=directory, key=directory.name, facts=manifest["facts"]))
        return sorted(found, key=lambda entry: entry.used_s, reverse=True)

    def is_in_use(self, key: str) -> bool:
        """Say whether a process uses the entry."""
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
        """Remove an entry unless a process uses it; return whether it is gone. The caller holds the key's lock."""
        if self.is_in_use(key):
            return False
        shutil.rmtree(self._quarantine(self.path / key, ""), ignore_errors=True)
        return True

    def verify(self, key: str) -> str:
        """Hash an entry's files again, whatever their stamps say. Return "", or the fault of an entry now quarantined.

        The caller holds the key's lock.
        """
        directory = self.path / key
        try:
            manifest = json.loads((directory / _MANIFEST).read_bytes())
            for known in manifest["files"].values():
                known["stamp"] = [0, 0, known["stamp"][2], 0, 0]
            fault = _fault(directory, {**manifest, "checksum": _checksum(manifest)}, key)
        except (OSError, ValueError, KeyError, TypeError) as error:
            fault = f"its manifest is not readable ({error})"
        if fault:
            self._quarantine(directory, "")
        return fault

    @contextmanager
    def locked(self, key: str, who: str, on_wait: Progress) -> Iterator[Progress]:
        """Hold the key's lock. Yield a function that records the phase of this process's build.

        Call `on_wait` with a sentence about the build that holds the lock. On a read-only file system no lock is taken:
        existing entries can be used, and nothing can be built.
        """
        from filelock import FileLock, Timeout  # 0.07 s to import, and only builds need it

        lock = FileLock(self.path / f"{key}.lock", mode=0o600, thread_local=False)
        state, said = self.path / f"{key}.builder", ""
        while not lock.is_locked:
            try:
                lock.acquire(timeout=0.5, poll_interval=_POLL_S)
            except Timeout:
                if (text := _describe_builder(state)) != said:
                    on_wait(said := text)
            except OSError as error:
                if error.errno not in READ_ONLY_ERRORS:
                    raise
                break
            except Exception as error:  # a test has replaced os.open, which filelock calls
                what = f"cannot take the lock {lock.lock_file}: {type(error).__name__}: {error}"
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
    def scratch(self, fallback: Path | None = None) -> Iterator[Path]:
        """Yield a directory that is removed after the block, or by the next start if this process is killed.

        The directory is in `fallback` if the store is read-only.
        """
        key = f"copy-{os.urandom(8).hex()}"
        with self.locked(key, "a copy", lambda _text: None):
            place = self.path if key in self._held or fallback is None else fallback
            directory = place / f"{key}.tmp-{getpid()}"
            try:
                directory.mkdir(mode=0o700)
                yield directory
            finally:
                shutil.rmtree(directory, ignore_errors=True)
                with suppress(OSError):
                    (self.path / f"{key}.lock").unlink()

    def build(self, key: str, make: Callable[[Path], Mapping[str, Any]]) -> Entry:
        """Publish the directory that `make` fills, with the facts that it returns. The caller holds the key's lock.

        Raise HostError when the disk is full (the message has the directory), or when another run uses the entry to be
        replaced. A failed build leaves no files.
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
                f"cannot replace cache entry {key[:12]}: another run uses it",
                hint="leave out --fcvm-rebuild, or wait until that run ends",
            )

    def _sweep_key(self, key: str) -> None:
        for directory in self.path.glob(f"{key}.tmp-*"):
            shutil.rmtree(directory, ignore_errors=True)

    def _quarantine(self, directory: Path, fault: str) -> Path:
        quarantined = self.path / f"{directory.name}.bad-{os.urandom(4).hex()}"
        with suppress(OSError):
            for old in self.path.glob(f"{directory.name}.bad-*"):
                shutil.rmtree(old, ignore_errors=True)
            directory.rename(quarantined)
        if fault:
            self.note(f"cache entry {directory.name[:12]} is quarantined and rebuilt: {fault} ({quarantined})")
        return quarantined


class Store:
    """The cache directory of one user."""

    def __init__(self, root: Path, note: Progress = lambda _text: None) -> None:
        self.root = root
        self._note = note

    def collection(self, kind: str) -> Collection:
        """Return the collection of a kind (images, kernels, snapshots). Create its directory if needed."""
        return Collection(path=self.directory(kind), note=self._note)

    def directory(self, name: str) -> Path:
        """Return a directory of the store, created if needed, for content of any layout."""
        path = self.root / name
        if not path.is_dir():
            with suppress(FileExistsError):
                _make_dir(path)
        return path

    def hidden_digest(self, value: Mapping[str, Any]) -> str:
        """Return an HMAC of values that nobody may guess from a key or a manifest: environment, metadata."""
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


def canonical_digest(value: Mapping[str, Any]) -> str:
    """Return the SHA-256 of canonical JSON (sorted keys, no spaces) as 64 hex digits."""
    return hashlib.sha256(_canonical(value)).hexdigest()


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


def _write_manifest(directory: Path, key: str, facts: Mapping[str, Any]) -> None:
    files = {
        path.name: {"sha256": content_digest(path), "stamp": stamp_of(path)}
        for path in sorted(directory.iterdir())
        if path.is_file() and not path.is_symlink()
    }
    _replace_manifest(directory, {"schema": MANIFEST_SCHEMA, "key": key, "facts": facts, "files": files})


def _replace_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    complete = {**manifest, "checksum": _checksum(manifest)}
    replace_file(directory / _MANIFEST, json.dumps(complete, indent=1, sort_keys=True))


def _checksum(manifest: Mapping[str, Any]) -> str:
    return canonical_digest({name: value for name, value in manifest.items() if name != "checksum"})


def _fault(directory: Path, manifest: Mapping[str, Any], key: str) -> str:
    if manifest["schema"] != MANIFEST_SCHEMA or manifest["key"] != key:
        return "it is from another version"
    if manifest["checksum"] != _checksum(manifest):
        return f"{_MANIFEST} has changed"
    changed = False
    for name, known in manifest["files"].items():
        try:
            stamp = stamp_of(directory / name)
        except FileNotFoundError:
            return f"{name} is missing"
        if stamp != known["stamp"]:
            if stamp[2] != known["stamp"][2] or content_digest(directory / name) != known["sha256"]:
                return f"{name} has changed"
            known["stamp"], changed = stamp, True
    if changed:
        with suppress(OSError):  # disk full: the entry is valid, and is hashed again next time
            _replace_manifest(directory, manifest)
    return ""


def _make_dir(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True)
    except OSError as error:
        if error.errno in READ_ONLY_ERRORS:
            raise HostError(
                f"the cache lacks what this run needs, and is read-only: {path}: {error.strerror}",
                hint="make the cache writable, or name another --fcvm-cache-dir",
            ) from error
        raise


def _raise_if_full(error: BaseException, directory: Path) -> None:
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        raise HostError(
            f"no room left in {directory.parent}: {error.strerror}",
            hint="free disk space or name another --fcvm-cache-dir",
        ) from error


def _write_builder(path: Path, who: str, phase: str) -> None:
    with suppress(OSError):
        replace_file(path, json.dumps({"pid": getpid(), "who": who, "phase": phase}))


def _describe_builder(path: Path) -> str:
    try:
        builder = json.loads(path.read_text())
        return f"waiting for pid {builder['pid']} ({builder['who']}): {builder['phase']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "waiting for another build"
