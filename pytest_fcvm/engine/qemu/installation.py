"""The QEMU of this host: where it is, what it can do, and the digests of all its files that a guest depends on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pytest_fcvm.engine.protocol import Accelerator
from pytest_fcvm.engine.qemu.version import QemuVersion, parse_version
from pytest_fcvm.errors import EngineError, HostError
from pytest_fcvm.host.paths import package_dir
from pytest_fcvm.host.process import find_tool, run_tool
from pytest_fcvm.host.records import Digests, Record, facts_about, stamps_of

__all__ = ["PROGRAM", "Installation", "find_qemu", "inspect"]

PROGRAM = "qemu-system-x86_64"

_FIRMWARE = ("bios-microvm.bin", "linuxboot_dma.bin", "pvh.bin")
_SLIRP = re.compile(r"(libslirp\S*) => (\S+)")
_WHEEL = "pytest_fcvm_qemu_x86_64"
_OURS = "(fcvm)"  # in the version of the QEMU that guest_image/vmm builds
_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Installation:
    """One QEMU. `rewinds` says whether it has the commands of guest_image/vmm.

    `digests` has the SHA-256 of the binary, its firmware and its slirp library, by file name.
    """

    binary: Path
    version: QemuVersion
    accelerators: frozenset[Accelerator]
    has_microvm: bool
    digests: Mapping[str, str]
    rewinds: bool = False

    @property
    def digest(self) -> str:
        """Return the digest of the binary itself."""
        return self.digests[self.binary.name]


def find_qemu(binary: Path | None = None, *, prefers_stock: bool = False) -> Path | None:
    """Return the QEMU to use: `binary`, else the wheel's unless `prefers_stock`, else the one on PATH, else None."""
    directory = None if prefers_stock else package_dir(_WHEEL)
    own = directory / PROGRAM if directory else None
    return binary or (own if own and own.is_file() else find_tool(PROGRAM))


def inspect(binary: Path, record_file: Path) -> Installation:
    """Return what a QEMU is. `record_file` keeps the answer until one of QEMU's files changes.

    Raise HostError when the binary cannot be run, EngineError when it is not QEMU.
    """
    return _to_installation(binary, facts_about(binary, record_file, _find_facts))


def _find_facts(binary: Path) -> Record:
    output = run_tool([binary, "--version"], timeout_s=_TIMEOUT_S)
    version = parse_version(output)
    if version is None:
        raise EngineError(f"{binary} does not say that it is QEMU: {output.strip()[:200]!r}", hint=f"install {PROGRAM}")
    files = [binary, *_find_firmware(binary), *_find_slirp(binary)]
    digests = Digests({})
    return {
        "version": list(version),
        "accelerators": _list_values(binary, "-accel"),
        "rewinds": _OURS in output,
        "microvm": "microvm" in _list_values(binary, "-machine"),
        "stamps": stamps_of(files),
        "digests": {path.name: digests.of(path) for path in files},
    }


def _list_values(binary: Path, option: str) -> list[str]:
    """Return the values that QEMU lists for an option."""
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


def _to_installation(binary: Path, known: Record) -> Installation:
    version, names, digests = known["version"], known["accelerators"], known["digests"]
    assert isinstance(version, list)
    assert isinstance(names, list)
    assert isinstance(digests, dict)
    return Installation(
        binary=binary,
        version=QemuVersion(*version),
        accelerators=frozenset(accelerator for accelerator in Accelerator if accelerator.value in names),
        has_microvm=bool(known["microvm"]),
        rewinds=bool(known.get("rewinds")),
        digests=digests,
    )
