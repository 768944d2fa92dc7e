"""The directory of a Firecracker, in which its input files have the same names for every VM.

Firecracker keeps the paths of drives in the device state, and opens these paths again in each clone's directory.
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
    """The directory of a Firecracker outside a jail. Input files are links, and output files need no collecting."""

    def __init__(self, directory: Path) -> None:
        self.directory = self.root = directory  # `root` is what Firecracker sees
        self.descriptors: dict[int, int] = {}  # to pass to Firecracker: its numbers, and ours

    def stage(self, inputs: Mapping[str, Path], *, changed: tuple[str, ...] = ()) -> None:  # noqa: ARG002  for jails
        """Give Firecracker files under these names, and write access to those in `changed`."""
        for name, path in inputs.items():
            (self.root / name).symlink_to(path)

    def stage_disk(self, image: Path) -> Disk:
        """Give Firecracker a private copy of a scratch disk's image, and return it. Raise HostError without room."""
        disk = Disk.copy_of(image)
        self.descriptors[DISK_FD] = disk.descriptor
        self.stage({SCRATCH: Path(f"/proc/self/fd/{DISK_FD}")})
        return disk

    @contextmanager
    def mounts(self) -> Iterator[int | None]:
        """Yield the mount namespace to start Firecracker in, None for our own."""
        yield None

    def command(self, firecracker: Path, name: str) -> list[str]:
        """Return the beginning of the command line, before Firecracker's other options."""
        return [str(firecracker), "--id", name]

    def explain_death(self, name: str, how: VmExit | None, *, console: Path, log: Path) -> FcvmError:
        """Return the error for a VM that has ended; `how` is None when its end was not seen."""
        return explain_death(name, how, console=console, log=log)

    def output_path(self, dest: Path) -> Path:
        """Return the path of an output file before `collect` moves it to `dest`."""
        return dest

    def output_name(self, dest: Path) -> str:
        """Return the name of an output file as Firecracker sees it."""
        return str(dest)

    def grant(self, path: Path) -> None:
        """Give Firecracker write access to an output file that we have created."""

    def collect(self, dest: Path) -> None:
        """Move an output file to `dest`, with mode 0600. Raise HostError without room."""
        dest.chmod(0o600)

    def discard(self, dest: Path) -> None:
        """Remove an output file, collected or not."""
        dest.unlink(missing_ok=True)
