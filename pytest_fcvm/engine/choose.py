"""Choose the engine: what was asked for, else the fastest that a probe says works."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pytest_fcvm.engine.protocol import Accelerator, Engine, EngineReport, GuestFiles
from pytest_fcvm.errors import EngineUnavailable, UsageProblem
from pytest_fcvm.host.supervisor.protocol import Spawner

__all__ = ["ENGINES", "Choice", "EngineContext", "choose_engine"]


@dataclass(frozen=True, kw_only=True)
class EngineContext:
    """What an engine is made of. `accelerator` None lets it choose.

    `binaries` are the VMMs by engine; one that is not there is looked for on PATH. With `jailed`, only an engine that
    puts its VMs in jails is taken.
    """

    spawner: Spawner
    cache_dir: Path
    accelerator: Accelerator | None = None
    binaries: Mapping[str, Path] = field(default_factory=dict)
    jailed: bool = False


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The engine that was chosen, its report, and the reports of those that were not."""

    engine: Engine
    report: EngineReport
    rejected: tuple[EngineReport, ...] = ()

    def __str__(self) -> str:
        """Say it as the terminal summary does: `qemu/tcg (why it is not KVM; firecracker: why it was not taken)`.

        Each reason in short, as it is no fault of this run; `fcvm doctor` says the whole.
        """
        reasons = [_in_short(self.report.reason)] if self.report.reason else []
        reasons += (f"{other.engine}: {_in_short(other.reason)}" for other in self.rejected if other.reason)
        told = "; ".join(reasons)
        return f"{self.report.engine}/{self.report.accelerator}{f' ({told})' if told else ''}"


def _in_short(reason: str) -> str:
    return reason.partition(": ")[0]


def _make_qemu(context: EngineContext) -> Engine:
    from pytest_fcvm.engine.qemu.engine import QemuEngine

    binary = context.binaries.get("qemu")
    return QemuEngine(context.spawner, context.cache_dir, binary=binary, accelerator=context.accelerator)


def _make_firecracker(context: EngineContext) -> Engine:
    from pytest_fcvm.engine.firecracker.engine import FirecrackerEngine

    binary = context.binaries.get("firecracker")
    return FirecrackerEngine(
        context.spawner, context.cache_dir, binary=binary, accelerator=context.accelerator, jailed=context.jailed
    )


_JAILED = "firecracker"  # the one that has a jailer

ENGINES: Mapping[str, Callable[[EngineContext], Engine]] = {"firecracker": _make_firecracker, "qemu": _make_qemu}
"""The engines by name, the preferred one first among equally fast ones."""


def choose_engine(
    wanted: str,
    context: EngineContext,
    smoke: GuestFiles,
    *,
    require_kvm: bool = False,
    engines: Mapping[str, Callable[[EngineContext], Engine]] = ENGINES,
) -> Choice:
    """Probe and choose. `wanted` is `auto` or an engine's name, either with `/kvm`, `/tcg` or `/auto` behind it.

    An engine with KVM is taken before one without, whatever their order. Raise UsageProblem for an unknown name,
    EngineUnavailable with every engine's reason when none works, or when KVM is required and does not.
    """
    names, context = _resolve(wanted, context, list(engines))
    reports: list[EngineReport] = []
    usable: list[tuple[Engine, EngineReport]] = []
    for name in names:
        engine = engines[name](context)
        report = engine.probe(smoke)
        reports.append(report)
        if report.usable:
            usable.append((engine, report))
        if report.usable and report.accelerator is Accelerator.KVM:
            break
    with_kvm = [pair for pair in usable if pair[1].accelerator is Accelerator.KVM]
    best = next(iter(with_kvm or ([] if require_kvm else usable)), None)
    if best is None:
        raise _none_works(reports, require_kvm=require_kvm)
    return Choice(engine=best[0], report=best[1], rejected=tuple(report for report in reports if report is not best[1]))


def _resolve(wanted: str, context: EngineContext, known: Sequence[str]) -> tuple[Sequence[str], EngineContext]:
    name, slash, accelerator = wanted.partition("/")
    if name not in ("auto", *known):
        raise UsageProblem(f"there is no engine {name!r}", hint=f"--fcvm-engine auto|{'|'.join(known)}")
    if slash and accelerator not in ("auto", *Accelerator):
        raise UsageProblem(
            f"there is no accelerator {accelerator!r}", hint=f"--fcvm-accel auto|{'|'.join(Accelerator)}"
        )
    if accelerator in tuple(Accelerator):
        context = replace(context, accelerator=Accelerator(accelerator))
    if context.jailed and name not in ("auto", _JAILED):
        raise UsageProblem(f"the engine {name} has no jailer", hint="leave out --fcvm-jailer or --fcvm-engine")
    if context.jailed:
        name = _JAILED
    return (known if name == "auto" else [name]), context


def _none_works(reports: Sequence[EngineReport], *, require_kvm: bool) -> EngineUnavailable:
    reasons = "; ".join(f"{report.engine}: {report.reason}" for report in reports)
    hints = [report.hint for report in reports if report.hint]
    hints.sort(key=lambda hint: "apt-get install" not in hint)  # what helps on any machine comes first
    if require_kvm and any(report.usable for report in reports):
        hint = "; ".join([*hints, "leave out --fcvm-require-kvm to emulate"])
        return EngineUnavailable(f"KVM is required and does not work here: {reasons}", hint=hint)
    return EngineUnavailable(f"no engine works here: {reasons}", hint="; ".join(hints))
