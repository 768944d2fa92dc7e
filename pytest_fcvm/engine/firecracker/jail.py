"""Run Firecracker in its jailer (its docs/jailer.md): each VM has its own user, and sees only the files staged for it.

The jailer makes BASE/PROGRAM/ID/root the root of the VMM. Each VM has a mount namespace, which binds a directory of
ours there, and binds the VM's input files into that directory. Only the program is copied, and only the VM's directory
is left to remove.

The VMM may replace the files in that directory at any time. So we write nothing there while the VMM runs, follow no
link, and move the VMM's output to another directory before we check it.
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
from pytest_fcvm.engine.launch import read_error
from pytest_fcvm.engine.protocol import VmExit
from pytest_fcvm.errors import EngineError, FcvmError, HostError
from pytest_fcvm.host.files import read_tail
from pytest_fcvm.host.mounts import open_mounts
from pytest_fcvm.host.own import getpid, os
from pytest_fcvm.host.process import find_tool, run_tool
from pytest_fcvm.host.sparse import move_file

__all__ = ["JailDir", "Jailer", "NotJailed", "find_jailer"]

_PROGRAM = "jailer"
_TIMEOUT_S = 30.0
_GROUP = 1 << 30  # of all jails: it may read the files that they share. No system assigns ids of this size
_serials = itertools.count()
# The jailer runs before Firecracker can print anything. It ends with a message and with Rust's text for the same error.
_FINAL_OUTPUT = re.compile(r"\A(?P<words>[A-Z].*)\nError: ")
_HINT = "in a container, give the jailer CAP_SYS_ADMIN and CAP_MKNOD; or leave out --fcvm-jailer"
_NOT_STATIC = "Failed to exec into Firecracker: No such file"


class NotJailed(EngineError):
    """The jailer ended before Firecracker began."""


@dataclass(frozen=True, kw_only=True)
class Jailer:
    """A jailer, and the Firecracker that it runs."""

    binary: Path
    firecracker: Path


class JailDir(VmDir):
    """The directory of a jailed Firecracker, which runs as its own user. Files that it writes are collected from it."""

    def __init__(self, directory: Path, jailer: Jailer) -> None:
        super().__init__(directory)
        self.root = directory / "root"
        self.root.mkdir(mode=0o700)
        self._jailer, self._user = jailer, _next_user()
        self._id = re.sub(r"[^A-Za-z0-9-]", "-", directory.name)
        self._base = directory / "jail"
        self._inputs: dict[str, Path] = {}

    def stage(self, inputs: Mapping[str, Path], *, changed: tuple[str, ...] = ()) -> None:
        """Give Firecracker files under these names, and write access to those in `changed`."""
        for name, path in inputs.items():
            _open_to_jails(path, writes=name in changed)
            (self.root / name).touch()
            self._inputs[name] = path

    def stage_disk(self, image: Path) -> Disk:
        """Give Firecracker a private copy of a scratch disk's image, and return it. Raise HostError without room."""
        path = self.root / SCRATCH
        disk = Disk.copy_of(image, path)
        try:
            self.grant(path)
        except BaseException:
            disk.close()
            raise
        return disk

    @contextmanager
    def mounts(self) -> Iterator[int | None]:
        """Yield a mount namespace in which the jail's root has all input files. Raise HostError."""
        root = self._base / self._jailer.firecracker.name / self._id / "root"
        root.mkdir(parents=True)
        binds = ((path, root / name) for name, path in self._inputs.items())
        descriptor = open_mounts([(self.root, root), *binds])
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def command(self, firecracker: Path, name: str) -> list[str]:  # noqa: ARG002  the jailer knows both
        """Return the beginning of the command line, before Firecracker's own options."""
        argv = [str(self._jailer.binary), "--id", self._id, "--exec-file", str(self._jailer.firecracker)]
        argv += ["--uid", str(self._user), "--gid", str(_GROUP), "--cgroup-version", "2"]
        return [*argv, "--chroot-base-dir", str(self._base), "--"]

    def explain_death(self, name: str, how: VmExit | None, *, console: Path, log: Path) -> FcvmError:
        """Return the error for a VM that has ended, NotJailed when the jailer ended before Firecracker began."""
        error = super().explain_death(name, how, console=console, log=log)
        final = _FINAL_OUTPUT.match(read_tail(log)) if how is not None and how.code == 1 else None
        if final is None:
            return error
        dynamic = final["words"].startswith(_NOT_STATIC)
        hint = "use a Firecracker that is linked statically, as in its releases" if dynamic else _HINT
        return NotJailed(f"VM {name} was not jailed: {final['words']}", hint=hint, evidence=error.evidence)

    def output_path(self, dest: Path) -> Path:
        """Return the path of an output file before `collect` moves it to `dest`."""
        return self.root / f"new-{dest.name}"

    def output_name(self, dest: Path) -> str:
        """Return the name of an output file as Firecracker sees it."""
        return self.output_path(dest).name

    def grant(self, path: Path) -> None:
        """Give Firecracker write access to an output file that we have created."""
        os.chown(path, self._user, _GROUP, follow_symlinks=False)

    def collect(self, dest: Path) -> None:
        """Move an output file to `dest`, with mode 0600. Raise HostError without room."""
        move_file(self.output_path(dest), dest)

    def discard(self, dest: Path) -> None:
        """Remove an output file, collected or not."""
        self.output_path(dest).unlink(missing_ok=True)
        super().discard(dest)


def find_jailer(firecracker: Path, version: FirecrackerVersion) -> Jailer:
    """Return the jailer beside a Firecracker, else the one on PATH.

    Raise HostError for a user other than root, without a jailer, or for a jailer of another version.
    """
    if os.geteuid() != 0:
        raise HostError("the jailer requires root", hint="run pytest as root, or leave out --fcvm-jailer")
    firecracker = firecracker.resolve()
    beside = firecracker.with_name(_PROGRAM)
    binary = beside if os.access(beside, os.X_OK) else find_tool(_PROGRAM)
    if binary is None:
        raise HostError(
            f"there is no jailer beside {firecracker}, and none on PATH",
            hint="run fcvm setup firecracker, which installs both, or leave out --fcvm-jailer",
        )
    output = run_tool([binary, "--version"], timeout_s=_TIMEOUT_S)
    if not re.match(rf"Jailer v{re.escape(str(version))}\s", output):
        raise HostError(
            f"{binary} is not the jailer of Firecracker {version}: {output.strip()[:100]!r}",
            hint="use a jailer and a Firecracker of one release",
        )
    return Jailer(binary=binary, firecracker=firecracker)


def _next_user() -> int:
    """Return a user id that no other VM has: it holds our process id, and a process has at most 256 VMs."""
    return _GROUP | (getpid() & 0x3FFFFF) << 8 | next(_serials) & 0xFF


def _open_to_jails(path: Path, *, writes: bool) -> None:
    """Let the jails' group read a file, and write it with `writes`, unless everybody may. Raise EngineError.

    A jail sees only the files that are staged for it.
    """
    wanted = 0o060 if writes else 0o040
    try:
        mode = path.stat().st_mode & 0o777
        if mode & wanted >> 3 != wanted >> 3:
            os.chown(path, -1, _GROUP)
            path.chmod(mode | wanted)
    except OSError as error:
        raise read_error(path, error) from error
