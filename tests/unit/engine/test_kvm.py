from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_fcvm.engine.kvm import SmokeTimeout, cached_or_probe, explain_missing_device
from pytest_fcvm.engine.protocol import Accelerator, GuestFiles
from pytest_fcvm.engine.qemu.installation import Installation
from pytest_fcvm.engine.qemu.smoke import boot_smoke
from pytest_fcvm.engine.qemu.version import QemuVersion

MSR = "QEMU was killed by SIGABRT: error: failed to set MSR 0x10a to 0x0"


class Verdict:
    """A smoke boot with a fixed answer. It counts its runs."""

    def __init__(self, answer: str | Exception) -> None:
        self.answer, self.runs = answer, 0

    def __call__(self) -> str:
        self.runs += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., str]:
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"kernel")

    def ask(verdict: Verdict, vmm: str = "digest") -> str:
        return cached_or_probe(tmp_path / "kvm.json", vmm, kernel, verdict)

    return ask


@pytest.mark.parametrize("reason", ["", MSR])
def test_the_verdict_of_a_smoke_boot_is_remembered(ask: Callable[..., str], reason: str) -> None:
    verdict = Verdict(reason)
    assert [ask(verdict), ask(verdict)] == [reason, reason]
    assert verdict.runs == 1


def test_another_vmm_kernel_or_boot_of_the_host_is_probed_again(ask: Callable[..., str], tmp_path: Path) -> None:
    ask(Verdict(MSR))
    assert ask(Verdict(""), vmm="another digest") == ""
    (tmp_path / "vmlinuz").write_bytes(b"another kernel")
    assert ask(Verdict("third"), vmm="another digest") == "third"
    record = json.loads((tmp_path / "kvm.json").read_text())
    record["verdict"]["name"] = "another-boot" + record["verdict"]["name"][12:]
    (tmp_path / "kvm.json").write_text(json.dumps(record))
    assert ask(Verdict("fourth"), vmm="another digest") == "fourth"


def test_the_verdict_of_a_boot_that_timed_out_lasts_ten_minutes(ask: Callable[..., str], tmp_path: Path) -> None:
    slow = Verdict(SmokeTimeout("no sign of the agent within 10 s"))
    assert ask(slow) == ask(slow) == "no sign of the agent within 10 s"
    assert slow.runs == 1
    record = json.loads((tmp_path / "kvm.json").read_text())
    assert record["verdict"]["until"] is not None
    record["verdict"]["until"] -= 601
    (tmp_path / "kvm.json").write_text(json.dumps(record))
    assert ask(Verdict("")) == ""


@pytest.mark.parametrize(
    ("flags", "module", "reason", "hint"),
    [
        ("fpu vmx", "kvm_intel", "there is no /dev/kvm in this container", "--device /dev/kvm"),
        ("fpu svm", "", "there is no /dev/kvm: its module is not loaded", "sudo modprobe kvm-amd"),
        ("fpu hypervisor", "", "may not run virtual machines", "nested=1"),
        ("fpu", "", "the CPU does not offer it", "firmware"),
    ],
)
def test_the_reason_for_a_missing_device_is_reported(
    tmp_path: Path, flags: str, module: str, reason: str, hint: str
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"CPU\t: 0\nmodel name\t: some\nflags\t\t: {flags}\n")
    if module:
        (tmp_path / "sys/module" / module).mkdir(parents=True)
    explained = explain_missing_device(tmp_path)
    assert reason in explained[0]
    assert hint in explained[1]


def test_a_device_that_may_be_opened_is_no_reason(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kvm").touch()
    assert explain_missing_device(tmp_path) == ("", "")


def test_a_device_of_somebody_else_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kvm").touch()
    monkeypatch.setattr("pytest_fcvm.engine.kvm.os.open", refuse)
    assert explain_missing_device(tmp_path) == (
        "/dev/kvm may not be opened by this user",
        "sudo usermod -aG kvm $USER, then log in again",
    )


INSTALLATION = Installation(
    binary=Path("/usr/bin/qemu-system-x86_64"),
    version=QemuVersion(7, 2, 22),
    accelerators=frozenset(Accelerator),
    has_microvm=True,
    digests={},
)
SMOKE = GuestFiles(kernel=Path("kernel"), initramfs=Path("initramfs"), rootfs=None)


def test_kvm_works_when_the_agents_banner_is_on_the_console(spawner: Any) -> None:
    spawner.console = b"[    0.1] PCI: Fatal: No config space access function found\r\nfcvm-agent: serving, 0.1\r\n"
    assert boot_smoke(spawner, INSTALLATION, SMOKE) == ""
    assert spawner.argv[spawner.argv.index("-accel") + 1] == "kvm"
    assert not (spawner.directory / "smoke").exists()


def test_a_vmm_that_dies_before_the_banner_is_quoted(spawner: Any) -> None:
    spawner.console = b"[    0.1] half a boot"
    spawner.log = "qemu-system-x86_64: error: failed to set MSR 0x10a to 0x0\n"
    assert boot_smoke(spawner, INSTALLATION, SMOKE) == (
        "/dev/kvm cannot boot a kernel: QEMU was killed by SIGABRT: error: failed to set MSR 0x10a to 0x0"
    )


def test_a_boot_that_shows_nothing_is_killed_at_its_deadline(spawner: Any) -> None:
    spawner.console = None
    with pytest.raises(SmokeTimeout, match=r"no sign of the agent within 0\.1 s"):
        boot_smoke(spawner, INSTALLATION, SMOKE, timeout_s=0.1)
    assert spawner.child.end.signal == 9
    assert not (spawner.directory / "smoke").exists()
