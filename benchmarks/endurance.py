#!/usr/bin/env python3
"""Make many clones in one process. Check that each answers, that each has its own identity, and that nothing grows.

    benchmarks/endurance.py --clones 1000 [--ask-every N] [--image IMAGE] [--pool N|auto] [--qemu PATH] [--json FILE]

Each clone answers an HTTP GET and prints random bytes, MAC, machine-id and boot id, which is the slowest part under
emulation. The table goes to standard output. The exit code is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import urllib.request
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from run import _build_image, parse_qemu

from pytest_fcvm.clone import Clone
from pytest_fcvm.harness import Harness
from pytest_fcvm.host.clock import monotonic
from pytest_fcvm.host.paths import run_root
from pytest_fcvm.model.parse import parse_pool, parse_ready
from pytest_fcvm.model.specs import VmSpec
from pytest_fcvm.options import Options

_SCRIPT = (
    "od -An -N16 -tx1 /dev/urandom; cat /sys/class/net/eth0/address /etc/machine-id /proc/sys/kernel/random/boot_id"
)
_NAMES = ("random bytes", "MAC", "machine-id", "boot id")
_ANSWER_S = 60
_MORE_FILES, _MORE_MIB = 8, 16  # allowed growth since the first samples


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Resources in use after a number of clones. `clone_ms` is the median since the previous sample."""

    clones: int
    clone_ms: float
    files: int
    threads: int
    pytest_mib: float
    supervisor_mib: float
    vmm_mib: float
    run_files: int
    store_files: int


def main() -> int:
    """Make the clones, print the samples and the findings."""
    arguments = _parse()
    image = arguments.image or f"oci:{_build_image()}:latest"
    every = max(1, min(arguments.every, arguments.clones))
    findings: list[str] = []
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(prefix="fcvm-endurance-") as shared:
        harness = Harness(
            Options(pool=parse_pool(arguments.pool), qemu=arguments.qemu), shared_dir=Path(shared), announce=_say
        )
        try:
            snapshot = harness.snapshot(VmSpec(image=image, ready=parse_ready("http:80/")), "endurance")
            seen: list[set[int]] = [set() for _ in _NAMES]
            times: list[float] = []
            print(
                _row(("clones", "ms", "files", "threads", "MiB", "guard MiB", "VMM MiB", "run dir", "store")),
                flush=True,
            )
            for number in range(1, arguments.clones + 1):
                started = monotonic()
                with snapshot.clone() as clone:
                    times.append((monotonic() - started) * 1e3)
                    vmm_mib = _resident_mib(clone.running.vm.pid)
                    findings += _look_at(clone, seen, number, asks=number % arguments.ask_every == 0)
                if number % every == 0:
                    samples.append(_sample(harness, number, times, vmm_mib))
                    times = []
                    print(_row(map(_shown, asdict(samples[-1]).values())), flush=True)
        finally:
            harness.close()
    findings += _growth(samples)
    for finding in findings[:20]:
        print(f"FOUND: {finding}")
    print(f"{arguments.clones} clones, {len(findings)} findings")
    if arguments.json:
        data = {"image": image, "samples": [asdict(sample) for sample in samples], "findings": findings}
        arguments.json.write_text(json.dumps(data, indent=1) + "\n")
    return int(bool(findings))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--clones", type=int, default=1000, metavar="N", help="how many (default: 1000)")
    parser.add_argument("--every", type=int, default=100, metavar="N", help="clones between samples (default: 100)")
    parser.add_argument(
        "--ask-every", type=int, default=1, metavar="N", help="ask only each Nth clone for its identity"
    )
    parser.add_argument("--image", metavar="IMAGE", help="an image with a web server (default: our nginx)")
    parser.add_argument("--pool", default="auto", metavar="N|auto", help="clones to prewarm (default: auto)")
    parser.add_argument("--qemu", type=parse_qemu, metavar="PATH|stock", help="as --fcvm-qemu takes it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write samples and findings to a file")
    return parser.parse_args()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _look_at(clone: Clone, seen: list[set[int]], number: int, *, asks: bool) -> list[str]:
    """Talk to a clone and return the failed checks."""
    try:
        with urllib.request.urlopen(clone.url(80), timeout=_ANSWER_S) as answer:
            answer.read()
        lines = clone.succeed(_SCRIPT).splitlines() if asks else []
    except Exception as error:  # noqa: BLE001  record any failure and try the next clone
        return [f"clone {number} does not answer: {error}"]
    found = []
    for name, value, known in zip(_NAMES, map(str.strip, lines), seen, strict=asks):
        if hash(value) in known:  # hashes use little memory, which would count as growth
            found.append(f"clone {number} has the {name} of another clone: {value}")
        known.add(hash(value))
    return found


def _sample(harness: Harness, number: int, times: list[float], vmm_mib: float) -> Sample:
    facts = Path(f"/proc/self/fdinfo/{harness.supervisor._guard}").read_text()
    guard = next(line for line in facts.splitlines() if line.startswith("Pid:")).split()[1]
    return Sample(
        clones=number,
        clone_ms=statistics.median(times),
        files=_count(Path("/proc/self/fd")),
        threads=_count(Path("/proc/self/task")),
        pytest_mib=_resident_mib("self"),
        supervisor_mib=_resident_mib(guard),
        vmm_mib=vmm_mib,
        run_files=_count_files(run_root()),
        store_files=_count_files(harness.store.root),
    )


def _resident_mib(pid: int | str) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def _count(directory: Path) -> int:
    return sum(1 for _ in directory.iterdir())


def _count_files(directory: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(directory))


def _growth(samples: list[Sample]) -> list[str]:
    """Compare the last sample with the first two, after which every cache is filled."""
    if len(samples) < 3:
        return []
    found = []
    for name, more in (
        *(("files", _MORE_FILES), ("threads", _MORE_FILES), ("run_files", 4 * _MORE_FILES)),
        *(("store_files", _MORE_FILES), ("pytest_mib", _MORE_MIB), ("supervisor_mib", _MORE_MIB)),
    ):
        first, last = max(getattr(sample, name) for sample in samples[:2]), getattr(samples[-1], name)
        if last > first + more:
            found.append(f"{name} grew from {first:.0f} to {last:.0f}")
    return found


def _shown(value: float) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _row(cells: Iterable[str]) -> str:
    return "".join(f"{cell:>11}" for cell in cells)


if __name__ == "__main__":
    sys.exit(main())
