"""Firecracker in its jailer (its docs/jailer.md): as a user of its own, with nothing of the host but what it is given.

The jailer makes BASE/PROGRAM/ID/root its root. A mount namespace of the VM's own puts a directory of the VM's directory
there, and the files that it reads into that. So nothing is copied but the program, and nothing is left to clean up but
the directory.

What is in that directory is the jailed program's to replace at any time: nothing of ours is written there once it runs, no
link is followed, and what it has written is looked at where it cannot reach.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pytest_fcvm.engine.disk import Disk
from pytest_fcvm.engine.firecracker.requests import SCRATCH
from pytest_fcvm.engine.firecracker.version import FirecrackerVersion
from pytest_fcvm.engine.firecracker.vm_dir import VmDir
from pytest_fcvm.engine.launch import unreadable
from pytest_fcvm.engine.post_mortem import read_tail
from pytest_fcvm.engine.protocol import VmExit
from pytest_fcvm.errors import EngineError, FcvmError, HostError
from pytest_fcvm.host.mounts import open_mounts
from pytest_fcvm.host.own import getpid, os
from pytest_fcvm.host.process import find_tool, run_tool
from pytest_fcvm.host.sparse import move_file

__all__ = ["JailDir", "Jailer", "NotJailed", "find_jailer"]

_PROGRAM = "jailer"
_TIMEOUT_S = 30.0
_GROUP = 1 << 30  # of all cells: it reads what they share. No system gives ids of that size to anybody
_serials = itertools.count()
# The jailer ends with a line for people and one for Rust's; it runs before Firecracker can say anything.
_LAST_WORDS = re.compile(r"\A(?P<words>[A-Z].*)\nError: ")
_HINT = "in a container the jailer takes CAP_SYS_ADMIN and CAP_MKNOD; or leave out --fcvm-jailer"
_NOT_STATIC = "Failed to exec into Firecracker: No such file"


class NotJailed(EngineError):
    """The jailer ended before Firecracker began."""


@dataclass(frozen=True, kw_only=True)
class Jailer:
    """A jailer, and the Firecracker that it runs."""

    binary: Path
    firecracker: Path


class JailDir(VmDir):
    """The home of a jailed Firecracker: it has a user of its own there, and writes files that are then taken out."""

    def __init__(self, directory: Path, jailer: Jailer) -> None:
        super().__init__(directory)
        self.root = directory / "cell"
        self.root.mkdir(mode=0o700)
        self._jailer, self._user = jailer, _next_user()
        self._id = re.sub(r"[^A-Za-z0-9-]", "-", directory.name)
        self._base = directory / "jail"
        self._inputs: dict[str, Path] = {}

    def put(self, inputs: Mapping[str, Path], *, changed: tuple[str, ...] = ()) -> None:
        """Let it find files under names of ours, and write to those that are `changed`."""
        for name, path in inputs.items():
            _open_to_cells(path, writes=name in changed)
            (self.root / name).touch()
            self._inputs[name] = path

    def put_disk(self, image: Path) -> Disk:
        """Let it find a private copy of a scratch disk's image. Raise HostError without room."""
        place = self.root / SCRATCH
        disk = Disk.copy_of(image, place)
        try:
            self.admit(place)
        except BaseException:
            disk.close()
            raise
        return disk

    @contextmanager
    def mounts(self) -> Iterator[int | None]:
        """Lend a mount namespace in which its root is whole. Raise HostError."""
        root = self._base / self._jailer.firecracker.name / self._id / "root"
        root.mkdir(parents=True)
        places = ((path, root / name) for name, path in self._inputs.items())
        descriptor = open_mounts([(self.root, root), *places])
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def command(self, firecracker: Path, name: str) -> list[str]:  # noqa: ARG002  the jailer has them
        """Return the beginning of a command whose program is Firecracker here."""
        argv = [str(self._jailer.binary), "--id", self._id, "--exec-file", str(self._jailer.firecracker)]
        argv += ["--uid", str(self._user), "--gid", str(_GROUP), "--cgroup-version", "2"]
        return [*argv, "--chroot-base-dir", str(self._base), "--"]

    def explain_death(self, name: str, how: VmExit | None, *, console: Path, log: Path) -> FcvmError:
        """Return the error of whoever needed a VM that has ended here, NotJailed when it was the jailer that ended."""
        error = super().explain_death(name, how, console=console, log=log)
        said = _LAST_WORDS.match(read_tail(log)) if how is not None and how.code == 1 else None
        if said is None:
            return error
        static = said["words"].startswith(_NOT_STATIC)
        hint = "use a Firecracker that is linked statically, as in its releases" if static else _HINT
        return NotJailed(f"VM {name} was not jailed: {said['words']}", hint=hint, evidence=error.evidence)

    def place(self, dest: Path) -> Path:
        """Return where it is to write what will be `dest`."""
        return self.root / f"new-{dest.name}"

    def name(self, dest: Path) -> str:
        """Return what it calls that place."""
        return self.place(dest).name

    def admit(self, path: Path) -> None:
        """Let it write to a file of ours in such a place."""
        os.chown(path, self._user, _GROUP, follow_symlinks=False)

    def deliver(self, dest: Path) -> None:
        """Bring what it has written to its place, with mode 0600. Raise HostError without room."""
        move_file(self.place(dest), dest)

    def discard(self, dest: Path) -> None:
        """Remove what it has written of it."""
        self.place(dest).unlink(missing_ok=True)
        super().discard(dest)


def find_jailer(firecracker: Path, version: FirecrackerVersion) -> Jailer:
    """Return the jailer beside a Firecracker, else the one on PATH.

    Raise HostError for a user who may not use it, when there is none, or when it is of another version.
    """
    if os.geteuid() != 0:
        raise HostError("the jailer takes root", hint="run pytest as root, or leave out --fcvm-jailer")
    firecracker = firecracker.resolve()
    beside = firecracker.with_name(_PROGRAM)
    binary = beside if os.access(beside, os.X_OK) else find_tool(_PROGRAM)
    if binary is None:
        raise HostError(
            f"there is no jailer beside {firecracker}, and none on PATH",
            hint="fcvm setup firecracker, which gets both, or leave out --fcvm-jailer",
        )
    said = run_tool([binary, "--version"], timeout_s=_TIMEOUT_S)
    if not re.match(rf"Jailer v{re.escape(str(version))}\s", said):
        raise HostError(
            f"{binary} is not the jailer of Firecracker {version}: {said.strip()[:100]!r}",
            hint="use the two of one release",
        )
    return Jailer(binary=binary, firecracker=firecracker)


def _next_user() -> int:
    """Return a user that is nobody else's: no two processes have an id at once, and none has more than 256 VMs."""
    return _GROUP | (getpid() & 0x3FFFFF) << 8 | next(_serials) & 0xFF


def _open_to_cells(path: Path, *, writes: bool) -> None:
    """Let the cells' group read a file, or write it too, unless everybody may; they see what they are given alone.

    Raise EngineError for a file that is not there.
    """
    wanted = 0o060 if writes else 0o040
    try:
        mode = path.stat().st_mode & 0o777
        if mode & wanted >> 3 != wanted >> 3:
            os.chown(path, -1, _GROUP)
            path.chmod(mode | wanted)
    except OSError as error:
        raise unreadable(path, error) from error
