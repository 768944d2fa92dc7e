"""The QEMU of this host: where it is, what it can do, and the digests of everything of it that shapes a guest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pytest_fcvm.engine.protocol import Accelerator
from pytest_fcvm.engine.qemu.version import QemuVersion, parse_version
from pytest_fcvm.errors import EngineError, HostError
from pytest_fcvm.host.process import find_tool, run_tool
from pytest_fcvm.host.records import Digests, open_record, stamp

__all__ = ["PROGRAM", "Installation", "find_qemu", "inspect"]

PROGRAM = "qemu-system-x86_64"

_FIRMWARE = ("bios-microvm.bin", "linuxboot_dma.bin", "pvh.bin")
_SLIRP = re.compile(r"(libslirp\S*) => (\S+)")
_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Installation:
    """One QEMU. `digests` names the binary, its firmware and its slirp library, by file name."""

    binary: Path
    version: QemuVersion
    accelerators: frozenset[Accelerator]
    has_microvm: bool
    digests: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Return the digest of the binary itself."""
        return self.digests[self.binary.name]


def find_qemu(binary: Path | None = None) -> Path | None:
    """Return the QEMU to use: the one named, else the one on PATH, else None."""
    return binary if binary is not None else find_tool(PROGRAM)


def inspect(binary: Path, record_file: Path) -> Installation:
    """Ask a QEMU what it is. What it said is kept in `record_file` until one of its files changes.

    Raise HostError when it cannot be run, EngineError when it is not QEMU.
    """
    with open_record(record_file) as record:
        known = record.get(str(binary))
        if not (isinstance(known, dict) and _is_fresh(known.get("stamps"))):
            known = record[str(binary)] = _ask(binary)
    return _to_installation(binary, known)


def _ask(binary: Path) -> dict[str, object]:
    said = run_tool([binary, "--version"], timeout_s=_TIMEOUT_S)
    version = parse_version(said)
    if version is None:
        raise EngineError(f"{binary} does not say that it is QEMU: {said.strip()[:200]!r}", hint=f"install {PROGRAM}")
    files = [binary, *_find_firmware(binary), *_find_slirp(binary)]
    digests = Digests({})
    return {
        "version": list(version),
        "accelerators": _ask_words(binary, "-accel"),
        "microvm": "microvm" in _ask_words(binary, "-machine"),
        "stamps": {str(path): stamp(path) for path in files},
        "digests": {path.name: digests.of(path) for path in files},
    }


def _ask_words(binary: Path, option: str) -> list[str]:
    """Return the first word of every line of a list that QEMU prints."""
    lines = run_tool([binary, option, "help"], timeout_s=_TIMEOUT_S).splitlines()
    return [line.split()[0] for line in lines if line.strip()]


def _find_firmware(binary: Path) -> Iterator[Path]:
    directories = [Path(line.strip()) for line in run_tool([binary, "-L", "help"], timeout_s=_TIMEOUT_S).splitlines()]
    for name in _FIRMWARE:
        yield from [directory / name for directory in directories if (directory / name).is_file()][:1]


def _find_slirp(binary: Path) -> Iterable[Path]:
    with suppress(HostError):  # no ldd, or a static binary
        return [Path(match[2]) for match in _SLIRP.finditer(run_tool(["ldd", binary], timeout_s=_TIMEOUT_S))]
    return []


def _is_fresh(stamps: object) -> bool:
    if not isinstance(stamps, dict) or not stamps:
        return False
    with suppress(OSError):
        return all(stamp(Path(path)) == then for path, then in stamps.items())
    return False


def _to_installation(binary: Path, known: Mapping[str, object]) -> Installation:
    version, names, digests = known["version"], known["accelerators"], known["digests"]
    assert isinstance(version, list)
    assert isinstance(names, list)
    assert isinstance(digests, dict)
    return Installation(
        binary=binary,
        version=QemuVersion(*version),
        accelerators=frozenset(accelerator for accelerator in Accelerator if accelerator.value in names),
        has_microvm=bool(known["microvm"]),
        digests=digests,
    )
