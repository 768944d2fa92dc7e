"""Start a VMM in a directory of its own, with a socket pair for each channel to it."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pytest_fcvm.errors import EngineError
from pytest_fcvm.host.files import create_private
from pytest_fcvm.host.limits import translating_emfile
from pytest_fcvm.host.own import environment, os, shutil
from pytest_fcvm.host.sockets import Socket, socket_pair
from pytest_fcvm.host.sparse import creation_error
from pytest_fcvm.host.supervisor.protocol import Child, Spawner

__all__ = ["BASE_MACS", "Launched", "check_memory_file", "launch", "make_memory_file", "open_state", "read_error"]

BASE_MACS = ("52:54:00:fc:00:01", "52:54:00:fc:00:02", "52:54:00:fc:00:03")  # of a base's NICs; clones change the first
_PASSED_ON = ("LD_LIBRARY_PATH", "QEMU_MODULE_DIR", "TMPDIR")
_REBUILD_HINT = "build the snapshot again: --fcvm-rebuild"


@dataclass(frozen=True, kw_only=True)
class Launched:
    """A VMM that was spawned, and our ends of its sockets, by the descriptor numbers in the VMM."""

    child: Child
    directory: Path
    sockets: Mapping[int, socket.socket]

    @property
    def console(self) -> Path:
        """Return the file of the serial console."""
        return self.directory / "console.log"

    @property
    def log(self) -> Path:
        """Return the file that receives what the VMM prints."""
        return self.directory / "vmm.log"

    def discard(self) -> None:
        """Kill the VMM and close our ends of its sockets. Idempotent."""
        self.child.kill()
        for end in self.sockets.values():
            end.close()


def launch(
    spawner: Spawner,
    name: str,
    argv: Sequence[str],
    *,
    sockets: Sequence[int],
    unconnected: Sequence[int],
    files: Mapping[int, int] | None = None,
    directory: Path | None = None,
) -> Launched:
    """Spawn a VMM in `directory`, else in a new one.

    sockets: descriptor numbers in the VMM that are connected to us.
    unconnected: descriptor numbers in the VMM that are datagram sockets without a peer.
    files: descriptor numbers in the VMM, and which of our descriptors each one is.
    The directory is removed when the VMM has ended and was killed by us. Raise HostError.
    """
    with translating_emfile(name), ExitStack() as far_ends, ExitStack() as near_ends:
        if directory is None:
            directory = spawner.make_dir(name)
            near_ends.callback(shutil.rmtree, directory, ignore_errors=True)
        near: dict[int, socket.socket] = {}
        far: dict[int, int] = {}
        for fd in sockets:
            ours, theirs = socket_pair()
            near[fd] = near_ends.enter_context(ours)
            far[fd] = far_ends.enter_context(theirs).fileno()
        no_peer = far_ends.enter_context(Socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        far |= dict.fromkeys(unconnected, no_peer.fileno())
        child = spawner.spawn(
            argv,
            name=name,
            fds={**far, **(files or {})},
            stdout=directory / "vmm.log",
            cwd=directory,
            env=_environment(),
            owned_dir=directory,
        )
        near_ends.pop_all()
    return Launched(child=child, directory=directory, sockets=near)


def read_error(path: Path, error: OSError) -> EngineError:
    """Return the error for a file of a snapshot that cannot be read."""
    return EngineError(f"{path} cannot be read: {error.strerror}", hint=_REBUILD_HINT)


def make_memory_file(path: Path, mem_mib: int) -> None:
    """Create the sparse file for a guest's memory, with mode 0600. Raise HostError; no file is left then."""
    try:
        fd = create_private(path)
    except OSError as error:
        raise creation_error(path, error) from error
    try:
        os.ftruncate(fd, mem_mib << 20)
    except OSError as error:
        path.unlink()
        raise creation_error(path, error) from error
    finally:
        os.close(fd)


def check_memory_file(path: Path, mem_mib: int) -> None:
    """Raise EngineError for a file of the wrong size. QEMU accepts a longer file, and lengthens a shorter one."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise read_error(path, error) from error
    if size != mem_mib << 20:
        raise EngineError(f"{path} has {size} bytes and not {mem_mib << 20}", hint=_REBUILD_HINT)


@contextmanager
def open_state(path: Path) -> Iterator[int]:
    """Open a device state for reading, and close it again. Raise EngineError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise read_error(path, error) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _environment() -> dict[str, str]:
    """Return the VMM's environment: English messages, and nothing of the user's that could change what the VMM does."""
    ours = environment()
    passed_on = {name: ours[name] for name in _PASSED_ON if name in ours}
    return {"PATH": ours.get("PATH", os.defpath), "LC_ALL": "C", **passed_on}
