from __future__ import annotations

import signal
from pathlib import Path

import pytest

from pytest_fcvm.engine.protocol import VmExit
from pytest_fcvm.engine.qemu.post_mortem import explain_death
from pytest_fcvm.errors import EngineError, FcvmError
from pytest_fcvm.host.files import read_tail

PANIC = """[    4.1] sysrq: Trigger a crash
[    4.2] Kernel panic - not syncing: sysrq triggered crash
[    4.3] Rebooting in 1 seconds..
"""
BAD_STATE = """qemu-system-x86_64: Missing section footer for virtio-net
qemu-system-x86_64: load of migration failed: Invalid argument
"""


def die(tmp_path: Path, how: VmExit | None, *, console: str = "", log: str = "") -> FcvmError:
    (tmp_path / "console.log").write_text(console)
    (tmp_path / "vmm.log").write_text(log)
    return explain_death("vm", how, console=tmp_path / "console.log", log=tmp_path / "vmm.log")


@pytest.mark.parametrize(
    ("how", "console", "log", "message"),
    [
        (VmExit(code=0), PANIC, "", "VM vm ended: the guest's kernel panicked: sysrq triggered crash"),
        (VmExit(code=0), "[ 3.0] reboot: Power down", "", "VM vm ended: the guest shut down or reset itself"),
        (
            VmExit(code=1),
            "",
            BAD_STATE,
            "VM vm ended: QEMU exited with 1: load of migration failed: Invalid argument",
        ),
        (VmExit(code=1), "", "", "VM vm ended: QEMU exited with 1"),
        (VmExit(signal=signal.SIGKILL), "", "", "VM vm ended: somebody killed QEMU (SIGKILL)"),
        (VmExit(signal=signal.SIGKILL, killed_by_us=True), "", "", "VM vm was killed"),
        (VmExit(signal=signal.SIGSEGV), "", "oops", "VM vm ended: QEMU was killed by SIGSEGV: oops"),
        (
            VmExit(signal=signal.SIGABRT),
            "",
            "qemu-system-x86_64: error: failed to set MSR 0x10a to 0x0\nkvm.c:3183: Assertion `ret' failed.\n",
            "VM vm ended: QEMU was killed by SIGABRT: error: failed to set MSR 0x10a to 0x0",
        ),
        (VmExit(signal=64), "", "", "VM vm ended: QEMU was killed by SIGRTMAX"),
        (None, "", "", "VM vm ended: its monitor closed"),
    ],
)
def test_each_way_to_end_has_its_message(
    tmp_path: Path, how: VmExit | None, console: str, log: str, message: str
) -> None:
    error = die(tmp_path, how, console=console, log=log)
    assert isinstance(error, EngineError)
    assert error.message == message


def test_for_a_state_that_does_not_load_the_hint_is_to_rebuild(tmp_path: Path) -> None:
    assert "--fcvm-rebuild" in die(tmp_path, VmExit(code=1), log=BAD_STATE).hint
    assert "--fcvm-rebuild" not in die(tmp_path, VmExit(code=1), log="cannot allocate memory").hint


def test_the_evidence_is_the_end_of_console_and_log(tmp_path: Path) -> None:
    error = die(tmp_path, VmExit(code=0), console="x" * 100_000 + PANIC, log="words")
    assert error.evidence["console"].endswith(PANIC)
    assert len(error.evidence["console"]) == 16384
    assert error.evidence["VMM log"] == "words"


def test_a_missing_file_has_an_empty_tail(tmp_path: Path) -> None:
    assert read_tail(tmp_path / "nothing") == ""
