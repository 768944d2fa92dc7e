from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_fcvm.engine.cpu import CpuIdentity, read_cpu
from pytest_fcvm.engine.qemu.tsc import measure_tsc_khz, stable_tsc_khz
from pytest_fcvm.errors import HostError

CPUINFO = """CPU\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 7R32
microcode\t: 0x830107c
cpu MHz\t\t: 2799.998
"""
cpu = CpuIdentity(CPUINFO)


def forget_boot(record: Path) -> None:
    """Make the record look as if it had been written in an earlier boot of the host."""
    entries = json.loads(record.read_text())
    for entry in entries.values():
        entry["boot"] = "another boot"
    record.write_text(json.dumps(entries))


def test_a_cpu_is_identified_by_model_and_microcode() -> None:
    assert (cpu.model, cpu.microcode, cpu.mhz) == ("AMD EPYC 7R32", "0x830107c", 2799.998)


def test_two_measurements_agree_to_one_in_a_thousand_and_are_a_plausible_rate() -> None:
    first, second = measure_tsc_khz(), measure_tsc_khz()
    assert 500_000 < first < 8_000_000
    assert abs(first - second) < first / 1000


def test_the_counter_is_measured_once_per_boot(tmp_path: Path) -> None:
    numbers = iter([2_800_000])
    record = tmp_path / "tsc.json"
    assert [stable_tsc_khz(record, cpu, lambda: next(numbers)) for _ in range(3)] == [2_800_000] * 3


@pytest.mark.parametrize(
    ("later", "kept"), [(2_800_001, 2_800_000), (2_797_300, 2_800_000), (2_803_000, 2_803_000), (2_600_000, 2_600_000)]
)
def test_jitter_between_boots_keeps_the_rate_and_another_rate_replaces_it(
    tmp_path: Path, later: int, kept: int
) -> None:
    record = tmp_path / "tsc.json"
    stable_tsc_khz(record, cpu, lambda: 2_800_000)
    forget_boot(record)
    assert stable_tsc_khz(record, cpu, lambda: later) == kept
    assert stable_tsc_khz(record, cpu, lambda: 1) == kept


def test_each_cpu_has_its_own_rate(tmp_path: Path) -> None:
    record = tmp_path / "tsc.json"
    other = CpuIdentity(CPUINFO.replace("0x830107c", "0x8301099"))
    assert stable_tsc_khz(record, cpu, lambda: 2_800_000) == 2_800_000
    assert stable_tsc_khz(record, other, lambda: 2_800_100) == 2_800_100


def test_without_executable_memory_the_nominal_rate_is_used(tmp_path: Path) -> None:
    assert stable_tsc_khz(tmp_path / "tsc.json", cpu, lambda: 0) == 2_799_998


def test_an_unknown_rate_is_a_host_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="time stamp counter is unknown"):
        stable_tsc_khz(tmp_path / "tsc.json", CpuIdentity(""), lambda: 0)


def test_after_a_broken_record_the_rate_is_measured_again(tmp_path: Path) -> None:
    record = tmp_path / "tsc.json"
    record.write_text('{"AMD')
    assert stable_tsc_khz(record, cpu, lambda: 5) == 5


def test_this_hosts_cpu_can_be_read() -> None:
    assert read_cpu().model != "unknown"
