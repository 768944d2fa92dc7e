from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_fcvm.engine.protocol import Accelerator
from pytest_fcvm.engine.qemu.installation import inspect
from pytest_fcvm.errors import EngineError, HostError

MakeQemu = Callable[..., Path]


def asked(tmp_path: Path) -> int:
    return len((tmp_path / "asked").read_text().splitlines())


def test_an_installation_is_read_from_its_output_and_its_files(fake_qemu: MakeQemu, tmp_path: Path) -> None:
    found = inspect(fake_qemu(accelerators="tcg"), tmp_path / "qemu.json")
    assert found.version == (7, 2, 22)
    assert found.accelerators == {Accelerator.TCG}
    assert found.has_microvm
    assert sorted(found.digests) == ["bios-microvm.bin", "qemu-system-x86_64"]
    assert found.digest == found.digests["qemu-system-x86_64"]


def test_a_known_installation_is_not_run_a_second_time(fake_qemu: MakeQemu, tmp_path: Path) -> None:
    binary, record = fake_qemu(), tmp_path / "qemu.json"
    first = inspect(binary, record)
    runs = asked(tmp_path)
    assert inspect(binary, record) == first
    assert asked(tmp_path) == runs


def test_another_firmware_is_noticed_although_the_binary_is_the_same(fake_qemu: MakeQemu, tmp_path: Path) -> None:
    binary, record = fake_qemu(), tmp_path / "qemu.json"
    first = inspect(binary, record)
    (tmp_path / "firmware" / "bios-microvm.bin").write_bytes(b"FIRMWARE, the new one")
    second = inspect(binary, record)
    assert second.digests["bios-microvm.bin"] != first.digests["bios-microvm.bin"]
    assert second.digest == first.digest


def test_a_new_binary_under_the_same_name_is_inspected_again(fake_qemu: MakeQemu, tmp_path: Path) -> None:
    record = tmp_path / "qemu.json"
    inspect(fake_qemu(), record)
    assert inspect(fake_qemu(version="10.0.13"), record).version == (10, 0, 13)


def test_a_qemu_without_microvm_is_recognised(fake_qemu: MakeQemu, tmp_path: Path) -> None:
    assert not inspect(fake_qemu(vms="q35 pc"), tmp_path / "qemu.json").has_microvm


def test_another_program_is_not_accepted_as_qemu(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="does not say that it is QEMU"):
        inspect(Path("/bin/true"), tmp_path / "qemu.json")


def test_a_binary_that_cannot_be_run_is_a_host_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="could not be started"):
        inspect(tmp_path / "nothing", tmp_path / "qemu.json")
