"""Files of the guest: what is copied in and out of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pytest_fcvm.host import archive
from pytest_fcvm.host.own import os

if TYPE_CHECKING:
    from pytest_fcvm.clone.machine import Machine

__all__ = ["COPY_S", "FileVerbs"]

COPY_S = 600.0  # a whole transfer


class FileVerbs(ABC):
    """The verbs of a clone that copy. All raise GuestError with the agent's reason."""

    @abstractmethod
    def _live(self) -> Machine:
        """Return the VM. Raise GuestError when it takes no calls."""

    def copy_in(self, source: str | Path, dest: str) -> None:
        """Copy a file or folder of the host to the guest path `dest`, as root; a trailing slash means "into"."""
        path = Path(os.path.abspath(source))
        name = path.name if dest.endswith("/") else PurePosixPath(dest).name
        folder = dest.rstrip("/") or "/" if dest.endswith("/") else str(PurePosixPath(dest).parent)
        self._send_tar(folder, lambda send: archive.pack_path(path, name, send))

    def copy_out(self, source: str, dest: str | Path) -> None:
        """Copy a file or folder of the guest to the host path `dest`; into it where that is a folder."""
        path = Path(dest)
        final = path / PurePosixPath(source).name if path.is_dir() else path
        with self._live().agent.tar_out(source, timeout_s=COPY_S) as stream:
            archive.unpack_as(stream, final)

    def read_bytes(self, path: str) -> bytes:
        """Return the content of a file in the guest."""
        with self._live().agent.tar_out(path, timeout_s=COPY_S) as stream:
            return archive.unpack_file(stream)

    def read_text(self, path: str) -> str:
        """Return the content of a UTF-8 file in the guest."""
        return self.read_bytes(path).decode()

    def write_text(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a UTF-8 file in the guest, owned by root."""
        guest = PurePosixPath(path)
        self._send_tar(str(guest.parent), lambda send: archive.pack_text(text.encode(), guest.name, mode, send))

    def _send_tar(self, folder: str, pack: Callable[[Callable[[bytes], object]], None]) -> None:
        with self._live().agent.tar_in(folder, timeout_s=COPY_S) as sink:
            pack(sink.write)
