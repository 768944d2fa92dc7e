"""What Firecracker's VMs have and QEMU's do not: metadata as in a cloud, and a balloon."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_fcvm import CloneFactory, Snapshot, SnapshotFactory
from pytest_fcvm.errors import UsageProblem

METADATA = {"latest": {"meta-data": {"instance-id": "i-fcvm", "tags": {"stage": "test"}}}}
# The image of these tests has no curl, but bash. The service keeps connections open.
GET = r"""
exec 3<>/dev/tcp/169.254.169.254/80
printf 'GET %s HTTP/1.0\r\nAccept: %s\r\n\r\n' "$0" "$1" >&3
while IFS= read -r line <&3 && line=${line%$'\r'} && [ -n "$line" ]; do
  case $line in Content-Length:*) size=${line#*: } ;; esac
done
head -c "$size" <&3
"""


def _get(path: str, accept: str = "text/plain") -> list[str]:
    return ["bash", "-c", GET, path, accept]


def _on_firecracker(snapshot: Snapshot) -> bool:
    return snapshot.engine == "firecracker"


def test_programs_read_metadata_as_in_a_cloud_and_it_can_change(
    fcvm_snapshot: Snapshot,
    fcvm_snapshot_factory: SnapshotFactory,
    fcvm_clone_factory: CloneFactory,
    tmp_path: Path,
) -> None:
    (tmp_path / "metadata.json").write_text(json.dumps(METADATA))
    if not _on_firecracker(fcvm_snapshot):
        with pytest.raises(UsageProblem, match="the engine qemu serves no metadata") as caught:
            fcvm_snapshot_factory(metadata=METADATA, network="rootless")
        assert "--fcvm-host-port" in caught.value.hint
        return
    snapshot = fcvm_snapshot_factory(metadata=METADATA, network="rootless")
    same = fcvm_snapshot_factory(metadata=tmp_path / "metadata.json", network="rootless")
    assert same is snapshot
    first, second = fcvm_clone_factory(snapshot), fcvm_clone_factory(snapshot)
    assert first.succeed(_get("/latest/meta-data/instance-id")) == "i-fcvm"
    first.set_metadata({"latest": {"meta-data": {"instance-id": "i-other"}}})
    assert first.succeed(_get("/latest/meta-data/instance-id")) == "i-other"
    said = second.succeed(_get("/latest/meta-data/tags", "application/json"))
    assert json.loads(said) == {"stage": "test"}


def test_the_balloon_takes_memory_and_gives_it_back(fcvm_snapshot: Snapshot, fcvm_clone_factory: CloneFactory) -> None:
    if not _on_firecracker(fcvm_snapshot):
        with pytest.raises(UsageProblem, match="the engine qemu has no balloon"):
            fcvm_clone_factory(balloon=True)
        return
    clone = fcvm_clone_factory(balloon=True)
    before = _available_mib(clone.read_text("/proc/meminfo"))
    assert clone.inflate_balloon("64M") == 64
    taken = _available_mib(clone.read_text("/proc/meminfo"))
    assert taken < before - 50
    assert clone.inflate_balloon(0) == 0
    assert _available_mib(clone.read_text("/proc/meminfo")) > taken + 30  # the guest dropped some of its cache


def test_a_clone_without_a_balloon_or_metadata_refuses_both(fcvm_clone_factory: CloneFactory) -> None:
    clone = fcvm_clone_factory()
    with pytest.raises(UsageProblem, match="has no balloon"):
        clone.inflate_balloon("1M")
    with pytest.raises(UsageProblem, match="has no metadata"):
        clone.set_metadata({})


def _available_mib(meminfo: str) -> int:
    return int(meminfo.split("MemAvailable:")[1].split()[0]) >> 10
