"""Flatten layers and read the result."""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_fcvm.image.blobs import LayerBlob
from pytest_fcvm.image.layers import flatten
from pytest_fcvm.image.members import Limits

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `fakes`


class Flat:
    """A flattened image, read by Python's tarfile."""

    def __init__(self, stream: bytes) -> None:
        self.stream = stream
        self._archive = tarfile.TarFile(fileobj=io.BytesIO(stream))
        self.members = self._archive.getmembers()

    @property
    def names(self) -> list[str]:
        """All names, in order."""
        return [member.name for member in self.members]

    @property
    def files(self) -> list[str]:
        """The names of all members but directories."""
        return [member.name for member in self.members if not member.isdir()]

    def member(self, name: str) -> tarfile.TarInfo:
        """Return the only member with this name."""
        (found,) = [member for member in self.members if member.name == name]
        return found

    def read(self, name: str) -> bytes:
        """Return the content of a file. Follow hard links."""
        file = self._archive.extractfile(self.member(name))
        assert file is not None, f"{name} is not a file"
        return file.read()


@pytest.fixture
def flat(tmp_path: Path) -> Callable[..., Flat]:
    """Flatten layers, given as bytes, the lowest first."""

    def flatten_layers(*layers: bytes, whiteouts: bool = True, limits: Limits | None = None) -> Flat:
        blobs = []
        for number, layer in enumerate(layers):
            path = tmp_path / f"layer{number}"
            path.write_bytes(layer)
            blobs.append(LayerBlob(path=path))
        out = io.BytesIO()
        flatten(blobs, out.write, directory=tmp_path, whiteouts=whiteouts, limits=limits)
        return Flat(out.getvalue())

    return flatten_layers
