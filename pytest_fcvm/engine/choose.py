"""Choose the engine: the one that was asked for, else the fastest that works according to its probe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pytest_fcvm.engine.protocol import Accelerator, Engine, EngineReport, GuestFiles
from pytest_fcvm.errors import EngineUnavailable, UsageProblem
from pytest_fcvm.host.supervisor.protocol import Spawner

__all__ = ["ENGINES", "Choice", "EngineContext", "choose_engine"]


@dataclass(frozen=True, kw_only=True)
class EngineContext:
    """What an engine needs. `accelerator` None lets the engine choose.

    `binaries` has VMMs by the engine's name. The engine looks for others in our wheels, unless it `prefers_stock`, and
    on PATH. With `jailed`, VMs run in jails.
    """

    spawner: Spawner
    cache_dir: Path
    accelerator: Accelerator | None = None
    binaries: Mapping[str, Path] = field(default_factory=dict)
    prefers_stock: bool = False
    jailed: bool = False


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The engine that was chosen, its report, and the reports of the other engines."""

    engine: Engine
    report: EngineReport
    rejected: tuple[EngineReport, ...] = ()

    def __str__(self) -> str:
        """Return the text for the terminal summary: `qemu/tcg (why it is not KVM; firecracker: why it was rejected)`.

        Reasons are short, because they are no fault of this run. `fcvm doctor` shows them in full.
        """
        reasons = [_shorten(self.report.reason)] if self.report.reason else []
        reasons += (f"{other.engine}: {_shorten(other.reason)}" for other in self.rejected if other.reason)
        joined = "; ".join(reasons)
        return f"{self.report.engine}/{self.report.accelerator}{f' ({joined})' if joined else ''}"


@dataclass(frozen=True, kw_only=True)
class EngineKind:
    """How to make an engine, and whether it can run its VMs in jails."""

    make: Callable[[EngineContext], Engine]
    has_jailer: bool = False


def _shorten(reason: str) -> str:
    return reason.partition(": ")[0]


def _make_qemu(context: EngineContext) -> Engine:
    from pytest_fcvm.engine.qemu.engine import QemuEngine

    binary = context.binaries.get("qemu")
    return QemuEngine(
        context.spawner,
        context.cache_dir,
        binary=binary,
        accelerator=context.accelerator,
        prefers_stock=context.prefers_stock,
    )


def _make_firecracker(context: EngineContext) -> Engine:
    from pytest_fcvm.engine.firecracker.engine import FirecrackerEngine

    binary = context.binaries.get("firecracker")
    return FirecrackerEngine(
        context.spawner, context.cache_dir, binary=binary, accelerator=context.accelerator, jailed=context.jailed
    )


ENGINES: Mapping[str, EngineKind] = {
    "firecracker": EngineKind(make=_make_firecracker, has_jailer=True),
    "qemu": EngineKind(make=_make_qemu),
}
"""The engines by name. Of two equally fast ones, the first is preferred."""


def choose_engine(
    wanted: str,
    context: EngineContext,
    smoke: GuestFiles,
    *,
    require_kvm: bool = False,
    engines: Mapping[str, EngineKind] = ENGINES,
) -> Choice:
    """Probe the engines and choose one. `wanted` is `auto` or an engine's name, perhaps with `/kvm`, `/tcg` or `/auto`.
    Choose an engine with KVM before one without, whatever their order. Raise UsageProblem for an unknown name,
    EngineUnavailable with every engine's reason when none works, or when KVM is required and does not work.
    """
    names, context = _resolve(wanted, context, engines)
    reports: list[EngineReport] = []
    usable: list[tuple[Engine, EngineReport]] = []
    for name in names:
        engine = engines[name].make(context)
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


def _resolve(
    wanted: str, context: EngineContext, known: Mapping[str, EngineKind]
) -> tuple[Iterable[str], EngineContext]:
    """Return the names of the engines to probe, and the context with the accelerator that `wanted` names."""
    name, slash, accelerator = wanted.partition("/")
    if name not in ("auto", *known):
        raise UsageProblem(f"there is no engine {name!r}", hint=f"--fcvm-engine auto|{'|'.join(known)}")
    if slash and accelerator not in ("auto", *Accelerator):
        raise UsageProblem(
            f"there is no accelerator {accelerator!r}", hint=f"--fcvm-accel auto|{'|'.join(Accelerator)}"
        )
    if accelerator in tuple(Accelerator):
        context = replace(context, accelerator=Accelerator(accelerator))
    names = [other for other in known if name in ("auto", other)]
    fitting = [other for other in names if known[other].has_jailer or not context.jailed]
    if not fitting:
        raise UsageProblem(f"the engine {name} has no jailer", hint="leave out --fcvm-jailer or --fcvm-engine")
    return fitting, context


def _none_works(reports: Sequence[EngineReport], *, require_kvm: bool) -> EngineUnavailable:
    reasons = "; ".join(f"{report.engine}: {report.reason}" for report in reports)
    hints = [report.hint for report in reports if report.hint]
    hints.sort(key=lambda hint: "apt-get install" not in hint)  # first what helps on every host
    if require_kvm and any(report.usable for report in reports):
        hint = "; ".join([*hints, "leave out --fcvm-require-kvm to emulate"])
        return EngineUnavailable(f"KVM is required and does not work here: {reasons}", hint=hint)
    return EngineUnavailable(f"no engine works here: {reasons}", hint="; ".join(hints))
