"""Programs that wheels of this project bring, for hosts that lack them."""

from __future__ import annotations

from pathlib import Path

from pytest_fcvm.host.own import os
from pytest_fcvm.host.paths import package_dir

__all__ = ["bundle_of", "find_bundled"]

# A package, and the programs in its directory. QEMU is not here: `--fcvm-qemu` chooses it.
_BUNDLES = {"pytest_fcvm_tools_x86_64": frozenset({"skopeo", "mksquashfs", "zstd", "lz4"})}


def find_bundled(name: str) -> Path | None:
    """Return the program of an installed wheel, None if no wheel has it."""
    for package, programs in _BUNDLES.items():
        directory = package_dir(package) if name in programs else None
        if directory is not None and os.access(directory / name, os.X_OK):
            return directory / name
    return None


def bundle_of(program: Path) -> str:
    """Return the name of the wheel that brings this program, "" if it is the host's."""
    return program.parent.name.replace("_", "-") if program == find_bundled(program.name) else ""
