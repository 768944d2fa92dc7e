"""The files of `--fcvm-artifacts`: a directory per test, with a unique name that every file system accepts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pytest_fcvm.host.own import shutil

__all__ = ["directory_of", "write_artifacts"]

_MAX_BYTES = 150  # of a name's readable part; file systems allow 255, and some tools add a suffix


def directory_of(test: str) -> str:
    """Return a directory name for a test's id: readable, and unique even on file systems that ignore case."""
    digest = hashlib.sha256(test.encode("utf-8", "backslashreplace")).hexdigest()[:8]
    return f"{_plain_name(test)}-{digest}".lstrip("-.")


def write_artifacts(directory: Path, evidence: Mapping[str, Mapping[str, str]], files: Sequence[Path]) -> None:
    """Write the evidence of clones, by clone and title, and copy other files beside it. Raise OSError.

    Create the directory only if there is something to write.
    """
    for name, sections in evidence.items():
        for title, text in sections.items():
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / f"{_plain_name(name)}.{_plain_name(title)}.txt"
            path.write_bytes(f"{text}\n".encode("utf-8", "backslashreplace"))
    for file in files:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, directory)


def _plain_name(text: str) -> str:
    """Return the end of a text, without characters that are special in file names."""
    plain = re.sub(r"[^\w.-]+", "-", text).strip("-.")
    return plain.encode("utf-8", "ignore")[-_MAX_BYTES:].decode("utf-8", "ignore").lstrip("-.")
