"""Files of the guest: what is copied in and out of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pytest_fcvm.host.archive import pack_path, pack_text
from pytest_fcvm.host.own import os
from pytest_fcvm.host.unpack import unpack_as, unpack_file

if TYPE_CHECKING:
    from pytest_fcvm.clone.running import RunningVm

__all__ = ["COPY_S", "FileVerbs"]

COPY_S = 600.0  # a whole transfer
_ROOT = "0:0"


class FileVerbs(ABC):
    """The verbs of a clone that copy. All raise GuestError with the agent's reason."""

    @abstractmethod
    def _live(self) -> RunningVm:
        """Return the VM. Raise GuestError when it takes no calls."""

    def copy_in(self, source: str | Path, dest: str, *, owner: str | None = _ROOT) -> None:
        """Copy a file or directory of the host to the guest path `dest`; a trailing slash means "into".

        A file goes into `dest` where that is a directory already; a directory merges with it. Directories above are
        made. `owner` is a user of the image, and a group, by name or number, "app" or "app:staff"; None keeps the
        numbers of the host. A link is copied as what it leads to; links below a directory stay links.
        """
        path = Path(os.path.abspath(source))
        name = path.name or "host"
        place = f"{dest}{name}" if dest.endswith("/") else dest
        user = "" if owner in (None, _ROOT) else owner or ""
        with self._live().agent.tar_in(place, user=user, at_place=True, timeout_s=COPY_S) as sink:
            pack_path(path, name, sink.write, keeps_owner=owner is None)

    def copy_out(self, source: str, dest: str | Path) -> None:
        """Copy a file or directory of the guest to the host path `dest`; into it where that is a directory.

        A trailing slash means "into" as well. A link is copied as what it leads to; links below a directory stay links,
        wherever they lead. Devices, pipes and sockets below it are left out. Owners become the caller's, group and
        others may not write, and nothing is set-user-id.
        """
        path = Path(dest)
        into = path.is_dir() or str(dest).endswith("/")
        with self._live().agent.tar_out(source, timeout_s=COPY_S) as stream:
            unpack_as(stream, path / PurePosixPath(source).name if into else path)

    def read_bytes(self, path: str) -> bytes:
        """Return the content of a file in the guest."""
        with self._live().agent.tar_out(path, timeout_s=COPY_S) as stream:
            return unpack_file(stream)

    def read_text(self, path: str) -> str:
        """Return the content of a UTF-8 file in the guest."""
        return self.read_bytes(path).decode()

    def write_text(self, path: str, text: str, mode: int = 0o644, *, owner: str = _ROOT) -> None:
        """Write a UTF-8 file in the guest; `owner` is as for `copy_in`. Directories above are made."""
        user = "" if owner == _ROOT else owner
        with self._live().agent.tar_in(path, user=user, hides=True, timeout_s=COPY_S) as sink:
            pack_text(text.encode(), PurePosixPath(path).name or "text", mode, sink.write)
