from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_fcvm.engine.protocol import Accelerator
from pytest_fcvm.engine.qemu.installation import find_qemu, inspect
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


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The QEMU of an installed wheel, with another one on PATH."""
    on_path = tmp_path / "bin/qemu-system-x86_64"
    own = tmp_path / "site/pytest_fcvm_qemu_x86_64/qemu-system-x86_64"
    for program in (on_path, own):
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    (own.parent / "__init__.py").touch()
    monkeypatch.setenv("PATH", str(on_path.parent))
    monkeypatch.syspath_prepend(str(own.parents[1]))
    return own


def test_the_qemu_of_the_wheel_is_preferred(wheel: Path, tmp_path: Path) -> None:
    assert find_qemu() == wheel
    assert find_qemu(prefers_stock=True) == tmp_path / "bin/qemu-system-x86_64"
    assert find_qemu(Path("/named")) == Path("/named")


def test_a_wheel_without_its_program_is_passed_over(wheel: Path, tmp_path: Path) -> None:
    wheel.unlink()
    assert find_qemu() == tmp_path / "bin/qemu-system-x86_64"


@pytest.mark.parametrize(("package", "rewinds"), [("fcvm", True), ("Debian 1:7.2+dfsg-7", False), ("fcvmx", False)])
def test_our_own_qemu_is_known_by_its_version(fake_qemu: MakeQemu, tmp_path: Path, package: str, rewinds: bool) -> None:
    assert inspect(fake_qemu(package=package), tmp_path / "record.json").rewinds is rewinds
