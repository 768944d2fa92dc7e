from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_fcvm.engine.choose import Choice, EngineContext, EngineKind, choose_engine
from pytest_fcvm.engine.protocol import Accelerator, EngineReport, GuestFiles, VmShape
from pytest_fcvm.engine.qemu.engine import QemuEngine
from pytest_fcvm.errors import HostError, UsageProblem

SMOKE = GuestFiles(kernel=Path("kernel"), initramfs=Path("initramfs"), rootfs=None)
KVM, TCG = Accelerator.KVM, Accelerator.TCG


class FakeEngine:
    """An engine that only has a probe."""

    def __init__(self, name: str, works_with: Accelerator | None, probed: list[str]) -> None:
        self.name, self._works_with, self._probed = name, works_with, probed

    def probe(self, _: GuestFiles) -> EngineReport:
        self._probed.append(self.name)
        if self._works_with is None:
            return EngineReport(engine=self.name, usable=False, reason="not there", hint=f"install {self.name}")
        reason = "" if self._works_with is KVM else "no kvm"
        return EngineReport(engine=self.name, usable=True, accelerator=self._works_with, reason=reason, hint="modprobe")


class Bench:
    """Engines to choose from, by the accelerator that they work with. `probed` has the names of the probed ones."""

    def __init__(self, **engines: Accelerator | None) -> None:
        self.probed: list[str] = []
        self.contexts: list[EngineContext] = []
        self.engines = {name: self._kind(name, works) for name, works in engines.items()}

    def _kind(self, name: str, works: Accelerator | None) -> EngineKind:
        def make(context: EngineContext) -> Any:
            self.contexts.append(context)
            return FakeEngine(name, works, self.probed)

        return EngineKind(make=make, has_jailer=name == "firecracker")

    def choose(self, wanted: str = "auto", *, jailed: bool = False, **options: bool) -> Any:
        context = EngineContext(spawner=None, cache_dir=Path("cache"), jailed=jailed)  # type: ignore[arg-type]
        return choose_engine(wanted, context, SMOKE, engines=self.engines, **options)


def test_the_first_engine_with_kvm_is_chosen_and_no_further_one_is_probed() -> None:
    bench = Bench(firecracker=KVM, qemu=KVM)
    assert bench.choose().engine.name == "firecracker"
    assert bench.probed == ["firecracker"]


def test_kvm_counts_more_than_the_order_of_engines() -> None:
    choice = Bench(first=TCG, second=KVM).choose()
    assert choice.engine.name == "second"
    assert [report.engine for report in choice.rejected] == ["first"]


def test_an_engine_that_only_emulates_is_better_than_none_and_says_why() -> None:
    choice = Bench(firecracker=None, qemu=TCG).choose()
    assert str(choice) == "qemu/tcg (no kvm; firecracker: not there)"
    assert choice.rejected[0].reason == "not there"


def test_the_summary_shortens_reasons() -> None:
    report = EngineReport(engine="qemu", usable=True, accelerator=TCG, reason="/dev/kvm fails: SIGABRT: MSR")
    choice = Choice(engine=None, report=report)  # type: ignore[arg-type]
    assert str(choice) == "qemu/tcg (/dev/kvm fails)"


def test_a_named_engine_is_the_only_one_probed() -> None:
    bench = Bench(firecracker=KVM, qemu=TCG)
    assert bench.choose("qemu").engine.name == "qemu"
    assert bench.probed == ["qemu"]


def test_with_jailed_only_an_engine_with_a_jailer_is_probed() -> None:
    bench = Bench(firecracker=KVM, qemu=KVM)
    assert bench.choose(jailed=True).engine.name == "firecracker"
    bench = Bench(firecracker=None, qemu=KVM)
    with pytest.raises(HostError, match=r"no engine works here: firecracker: not there\n"):
        bench.choose(jailed=True)
    with pytest.raises(UsageProblem, match="the engine qemu has no jailer"):
        bench.choose("qemu/kvm", jailed=True)
    assert bench.probed == ["firecracker"]


@pytest.mark.parametrize(("wanted", "accelerator"), [("qemu/tcg", TCG), ("auto/kvm", KVM), ("qemu/auto", None)])
def test_an_accelerator_behind_the_name_is_passed_to_the_engine(wanted: str, accelerator: Accelerator | None) -> None:
    bench = Bench(qemu=TCG)
    bench.choose(wanted)
    assert bench.contexts[0].accelerator is accelerator


@pytest.mark.parametrize(
    ("wanted", "message"), [("xen", "no engine 'xen'"), ("qemu/hvf", "no accelerator 'hvf'"), ("", "no engine ''")]
)
def test_an_unknown_name_is_a_usage_problem_that_lists_the_known_ones(wanted: str, message: str) -> None:
    with pytest.raises(UsageProblem, match=message) as caught:
        Bench(qemu=TCG).choose(wanted)
    assert "auto|" in caught.value.hint


def test_without_any_engine_every_reason_is_reported() -> None:
    with pytest.raises(HostError) as caught:
        Bench(firecracker=None, qemu=None).choose()
    assert caught.value.message == "no engine works here: firecracker: not there; qemu: not there"
    assert caught.value.hint == "install firecracker; install qemu"


def test_a_required_kvm_is_not_replaced_by_emulation() -> None:
    with pytest.raises(HostError, match="KVM is required and does not work here: qemu: no kvm") as caught:
        Bench(qemu=TCG).choose(require_kvm=True)
    assert "--fcvm-require-kvm" in caught.value.hint
    assert Bench(qemu=KVM).choose(require_kvm=True).report.accelerator is KVM


@pytest.mark.parametrize("fields", [{"balloon": True}, {"metadata": True}])
def test_qemu_refuses_a_balloon_and_metadata(tmp_path: Path, fields: dict[str, bool]) -> None:
    engine = QemuEngine(None, tmp_path)  # type: ignore[arg-type]
    engine.check(VmShape(mem_mib=64, cpus=1))
    with pytest.raises(UsageProblem, match=r"the engine qemu (has no balloon|serves no metadata)") as caught:
        engine.check(VmShape(mem_mib=64, cpus=1, **fields))
    assert "--fcvm-engine firecracker" in caught.value.hint


def probe_unusable(tmp_path: Path, binary: Path, accelerator: Accelerator | None = TCG) -> EngineReport:
    engine = QemuEngine(None, tmp_path, binary=binary, accelerator=accelerator)  # type: ignore[arg-type]
    report = engine.probe(SMOKE)
    assert not report.usable
    return report


def test_a_qemu_that_is_too_old_is_not_usable_and_says_what_is(tmp_path: Path, fake_qemu: Callable[..., Path]) -> None:
    report = probe_unusable(tmp_path, fake_qemu(version="6.2.0"))
    assert "is QEMU 6.2.0; 7.2 or newer is needed" in report.reason
    assert "Debian 12" in report.hint


def test_a_qemu_without_microvm_is_not_usable(tmp_path: Path, fake_qemu: Callable[..., Path]) -> None:
    assert "no microvm machine" in probe_unusable(tmp_path, fake_qemu(vms="q35")).reason


def test_a_qemu_without_emulation_is_not_usable_for_it(tmp_path: Path, fake_qemu: Callable[..., Path]) -> None:
    assert "built without emulation" in probe_unusable(tmp_path, fake_qemu(accelerators="kvm")).reason


def test_a_qemu_without_kvm_refuses_the_accelerator_kvm(tmp_path: Path, fake_qemu: Callable[..., Path]) -> None:
    report = probe_unusable(tmp_path, fake_qemu(accelerators="tcg"), KVM)
    assert report.reason.startswith("KVM does not work here: ")
    assert "built without KVM" in report.reason


def test_a_missing_binary_is_not_usable(tmp_path: Path) -> None:
    assert "could not be started" in probe_unusable(tmp_path, tmp_path / "nothing").reason


@pytest.mark.parametrize("version", ["7.2.22", "10.0.13", "11.1.3", "12.0.0"])
def test_the_known_versions_and_newer_ones_are_usable_and_identified(
    tmp_path: Path, fake_qemu: Callable[..., Path], version: str
) -> None:
    engine = QemuEngine(None, tmp_path, binary=fake_qemu(version=version), accelerator=TCG)  # type: ignore[arg-type]
    report = engine.probe(SMOKE)
    assert (report.usable, report.version, report.accelerator) == (True, version, TCG)
    assert report.identity.keys() >= {"digest of qemu-system-x86_64", "version", "accelerator", "cpu", "tsc kHz"}
