"""The memory for clones: what the host has left, and what each of our control groups has left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["HostMemory"]

_MIB = 1 << 20
_UNLIMITED = 1 << 60  # cgroup v1 says "no limit" by a number near 2**63


@dataclass(frozen=True, kw_only=True)
class _Version:
    limits: tuple[str, ...]
    usage: str
    reclaimable: str


_V1 = _Version(limits=("memory.limit_in_bytes",), usage="memory.usage_in_bytes", reclaimable="total_inactive_file")
# Above memory.high the kernel throttles a process until it stands still, so memory.high is a limit too.
_V2 = _Version(limits=("memory.max", "memory.high"), usage="memory.current", reclaimable="inactive_file")


class HostMemory:
    """Read the kernel's figures. `root` replaces `/` in tests.

    Find the control groups with a limit once; read the limits at each call.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._meminfo = root / "proc/meminfo"
        self._groups = [group for group in _find_groups(root) if _limit(*group) < _UNLIMITED]

    def available_mib(self) -> int:
        """Return the memory that is available without swapping: the least of MemAvailable and what each group leaves.

        A group's page cache that can be dropped counts as free, as in MemAvailable.
        """
        rooms = [self._read_meminfo("MemAvailable")]
        for directory, version in self._groups:
            used = _read_number(directory / version.usage) - _read_stat(directory, version.reclaimable)
            rooms.append(_limit(directory, version) - used)
        return max(0, min(rooms)) // _MIB

    def total_mib(self) -> int:
        """Return the memory of the host, or the lowest limit of our control groups."""
        return min([self._read_meminfo("MemTotal"), *(_limit(*group) for group in self._groups)]) // _MIB

    def _read_meminfo(self, wanted: str) -> int:
        """Return bytes. The format is proc_meminfo(5): `Name:  N kB`."""
        with self._meminfo.open() as lines:
            for line in lines:
                if line.startswith(wanted):
                    return int(line.split()[1]) * 1024
        return 0


def _find_groups(root: Path) -> Iterator[tuple[Path, _Version]]:
    """Yield our control groups that account memory, and their visible ancestors: cgroups(7)."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            version = _V2 if not controllers else _V1 if "memory" in controllers.split(",") else None
            if version is None:
                continue
            for top, mount in _find_mounts(root, version):
                yield from _climb(root / mount.lstrip("/"), path.removeprefix(top.rstrip("/")), version)


def _find_mounts(root: Path, version: _Version) -> Iterator[tuple[str, str]]:
    """Yield the hierarchy's mounts as (root in the hierarchy, mount point): fields 4 and 5 of proc_pid_mountinfo(5)."""
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(maxsplit=2)
        if (kind == "cgroup2" and version is _V2) or (kind == "cgroup" and version is _V1 and "memory" in options):
            yield before.split()[3], before.split()[4]


def _climb(mount: Path, path: str, version: _Version) -> Iterator[tuple[Path, _Version]]:
    directory = mount / path.lstrip("/")
    while directory.is_relative_to(mount):
        if (directory / version.usage).exists():
            yield directory, version
        directory = directory.parent


def _limit(directory: Path, version: _Version) -> int:
    return min(_read_number(directory / name) for name in version.limits)


def _read_number(file: Path) -> int:
    try:
        text = file.read_text().strip()
    except OSError:
        return _UNLIMITED
    return int(text) if text.isdigit() else _UNLIMITED


def _read_stat(directory: Path, key: str) -> int:
    with suppress(OSError):
        for line in (directory / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    return 0
