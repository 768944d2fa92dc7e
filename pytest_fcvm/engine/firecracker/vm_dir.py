"""The directory that a Firecracker lives in, where what it reads has the same names in each VM.

Firecracker keeps the names of drives in the device state as they were given, and opens them again from each clone's
directory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pytest_fcvm.engine.disk import Disk
from pytest_fcvm.engine.firecracker.post_mortem import explain_death
from pytest_fcvm.engine.firecracker.requests import DISK_FD, SCRATCH
from pytest_fcvm.engine.protocol import VmExit
from pytest_fcvm.errors import FcvmError

__all__ = ["VmDir"]


class VmDir:
    """The home of a Firecracker in no jail: links lead to what it reads, and it writes files where they belong."""

    def __init__(self, directory: Path) -> None:
        self.directory = self.root = directory  # what is in `root` is Firecracker's
        self.descriptors: dict[int, int] = {}  # that it must be passed, by its numbers

    def put(self, inputs: Mapping[str, Path], *, changed: tuple[str, ...] = ()) -> None:  # noqa: ARG002  a cell's right
        """Let it find files under names of ours, and write to those that are `changed`."""
        for name, path in inputs.items():
            (self.root / name).symlink_to(path)

    def put_disk(self, image: Path) -> Disk:
        """Let it find a private copy of a scratch disk's image. Raise HostError without room."""
        disk = Disk.copy_of(image)
        self.descriptors[DISK_FD] = disk.descriptor
        self.put({SCRATCH: Path(f"/proc/self/fd/{DISK_FD}")})
        return disk

    @contextmanager
    def mounts(self) -> Iterator[int | None]:
        """Lend the mount namespace that it is to be started in, None for our own."""
        yield None

    def command(self, firecracker: Path, name: str) -> list[str]:
        """Return the beginning of a command whose program is Firecracker here."""
        return [str(firecracker), "--id", name]

    def explain_death(self, name: str, how: VmExit | None, *, console: Path, log: Path) -> FcvmError:
        """Return the error of whoever needed a VM that has ended here; `how` is None when its end was not seen."""
        return explain_death(name, how, console=console, log=log)

    def place(self, dest: Path) -> Path:
        """Return where it is to write what will be `dest`."""
        return dest

    def name(self, dest: Path) -> str:
        """Return what it calls that place."""
        return str(dest)

    def admit(self, path: Path) -> None:
        """Let it write to a file of ours in such a place."""

    def deliver(self, dest: Path) -> None:
        """Bring what it has written to its place, with mode 0600. Raise HostError without room."""
        dest.chmod(0o600)

    def discard(self, dest: Path) -> None:
        """Remove what it has written of it."""
        dest.unlink(missing_ok=True)
