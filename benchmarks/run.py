#!/usr/bin/env python3
"""Measure clones and, where it works, podman: medians of interleaved rounds.

Run it on an idle host: `make bench`, or `benchmarks/run.py --rounds 20 --json FILE`. The table goes to standard output,
messages go to standard error.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from host import cpu_ms_of, host_facts, private_kib_of
from http200 import fetch_until_200
from podman import NotHere, Podman, start_podman
from report import Measure, Report, load_warning, render_json, render_table
from suite import SuiteFailed, run_suite, write_suite

from pytest_fcvm.clone import Clone
from pytest_fcvm.harness import Harness
from pytest_fcvm.host.clock import Deadline, monotonic, wait_until
from pytest_fcvm.model.parse import parse_ready
from pytest_fcvm.model.specs import VmSpec
from pytest_fcvm.options import Options
from pytest_fcvm.snapshot import OpenSnapshot

_ROOT = Path(__file__).parents[1]
# This variable gives the benchmark a snapshot of its own. Rebuilding a shared one would take it from other runs.
_ENV = {"FCVM_BENCHMARK": "1"}
_ENV_OPTIONS = [f"--fcvm-env={name}={value}" for name, value in _ENV.items()]
_BODY_S = 0.1  # a test's body: the standby VMM starts in this time
_POOL_BODY_S = 0.2  # the pool makes the next clone in this time
_IDLE_S = 0.5
_GONE_S = 10.0
_IN_A_ROW = 3
_REPEATS = 3  # of slow work: building a snapshot, running a test file

_CLONE = "a clone made on demand, after a pause of 100 ms"
_POOL = "a clone from the pool, after a pause of 200 ms (ready: http:80/)"
_ROW = "a clone, right after the one before"
_REWOUND = "a clone in the rewound VM of the one before (ready: http:80/)"
_SNAPSHOT = "a snapshot, built once per image"
_SERIAL = "a test in pytest (one GET)"
_WORKERS = "the same, -n 2"
_PODMAN = "podman, in the same rounds"


def _life_measures(prefix: str, section: str) -> tuple[Measure, ...]:
    """Return the figures of `_time_life`, but close()."""
    parts = (
        ("ready", "until clone() returns", "podman_run"),
        ("200", "until the first HTTP 200", "podman_200"),
        ("life", "clone, HTTP 200, close(), as the test sees it", "podman_life"),
    )
    return tuple(
        Measure(key=f"{prefix}_{key}", title=title, unit="ms", section=section, rival=rival)
        for key, title, rival in parts
    )


MEASURES = (
    Measure(key="ready", title="until clone() returns", unit="ms", section=_CLONE, rival="podman_run"),
    Measure(key="spawn", title="… of it: VMM started, or standby taken", unit="ms", section=_CLONE),
    Measure(key="agent", title="… of it: state loaded, agent answers", unit="ms", section=_CLONE),
    Measure(key="answer", title="… of it: service answers", unit="ms", section=_CLONE),
    Measure(key="first_200", title="until the first HTTP 200", unit="ms", section=_CLONE, rival="podman_200"),
    Measure(
        key="served_200",
        title="until the first HTTP 200, with ready: http:80/",
        unit="ms",
        section=_CLONE,
        rival="podman_200",
    ),
    # close() does not wait for the killed VMM, but `podman rm` waits for its container. So compare until both are gone.
    Measure(key="close", title="close(), as the test sees it", unit="ms", section=_CLONE),
    Measure(key="gone", title="close() until the VMM is gone", unit="ms", section=_CLONE, rival="podman_rm"),
    Measure(
        key="life",
        title="clone, HTTP 200, close(), as the test sees it",
        unit="ms",
        section=_CLONE,
        rival="podman_life",
    ),
    Measure(key="host_cpu", title="CPU of the pytest process until clone() returns", unit="ms", section=_CLONE),
    Measure(key="vmm_cpu", title="CPU of the VMM from its start until clone() returns", unit="ms", section=_CLONE),
    Measure(key="private", title="private memory of an idle clone's VMM", unit="MiB", section=_CLONE),
    Measure(key="anonymous", title="anonymous memory of an idle clone's VMM", unit="MiB", section=_CLONE),
    *_life_measures("pool", _POOL),
    Measure(key="row_ready", title="until clone() returns", unit="ms", section=_ROW, rival="podman_run"),
    Measure(key="row_spawn", title="… of it: VMM started, or standby taken", unit="ms", section=_ROW),
    Measure(key="row_agent", title="… of it: state loaded, agent answers", unit="ms", section=_ROW),
    Measure(key="row_answer", title="… of it: service answers", unit="ms", section=_ROW),
    Measure(key="row_close", title="close(), as the test sees it", unit="ms", section=_ROW),
    *_life_measures("rewound", _REWOUND),
    Measure(key="rewound_vmm_cpu", title="CPU of the VMM for all of that", unit="ms", section=_REWOUND),
    Measure(key="rewound_host_cpu", title="CPU of the pytest process for all of that", unit="ms", section=_REWOUND),
    Measure(key="boot_ms", title="until the agent answers", unit="ms", section=_SNAPSHOT),
    Measure(key="ready_ms", title="until the workload is ready", unit="ms", section=_SNAPSHOT),
    Measure(key="save_ms", title="quiesce, settle, stop, state saved", unit="ms", section=_SNAPSHOT),
    Measure(key="total_ms", title="all of it", unit="ms", section=_SNAPSHOT),
    Measure(key="serial_setup", title="set-up", unit="ms", section=_SERIAL),
    Measure(key="serial_teardown", title="teardown", unit="ms", section=_SERIAL),
    Measure(key="serial_test", title="set-up, call, teardown", unit="ms", section=_SERIAL),
    Measure(key="serial_wall", title="pytest's wall time ÷ tests, its start included", unit="ms", section=_SERIAL),
    Measure(key="workers_setup", title="set-up", unit="ms", section=_WORKERS),
    Measure(key="workers_teardown", title="teardown", unit="ms", section=_WORKERS),
    Measure(key="workers_test", title="set-up, call, teardown", unit="ms", section=_WORKERS),
    Measure(key="workers_wall", title="pytest's wall time ÷ tests, its start included", unit="ms", section=_WORKERS),
    Measure(key="podman_run", title="run --detach", unit="ms", section=_PODMAN),
    Measure(key="podman_200", title="run until the first HTTP 200", unit="ms", section=_PODMAN),
    Measure(key="podman_rm", title="rm --force --time=0", unit="ms", section=_PODMAN),
    Measure(key="podman_life", title="run, HTTP 200, rm", unit="ms", section=_PODMAN),
)


def main() -> int:
    """Measure, print the table, write the JSON. Return 0 even without podman or xdist; the table says so."""
    arguments = _parse()
    facts = host_facts()  # before the benchmark raises the load
    _print_facts(facts)
    warning = load_warning(float(facts["load"]), int(facts["cores"]))
    print(warning, end="\n" if warning else "", flush=True)
    layout = _build_image()
    image = f"oci:{layout}:latest"
    report = Report(measures=MEASURES, rounds=arguments.rounds, host=facts)
    with tempfile.TemporaryDirectory(prefix="fcvm-bench-") as scratch:
        directory = Path(scratch)
        options = Options(pool=0, rewind="off", kernel=arguments.kernel, qemu=arguments.qemu)
        _measure_builds(report, image, options, directory)
        with ExitStack() as stack:
            podman = _enter_podman(stack, layout, directory / "podman", report)
            snapshot = stack.enter_context(_opened(image, options, directory / "rounds", report))
            served = stack.enter_context(_opened(image, options, directory / "served", report, ready="http:80/"))
            pooled = stack.enter_context(
                _opened(image, replace(options, pool=1), directory / "pool", report, ready="http:80/")
            )
            rewound = stack.enter_context(
                _opened(image, replace(options, rewind="on"), directory / "rewound", report, ready="http:80/")
            )
            report.host = {**report.host, **(podman.facts() if podman else {})}
            _print_facts({name: value for name, value in report.host.items() if name not in facts})
            _measure_rounds(report, snapshot, served, pooled, rewound, podman)
        given = {"kernel": arguments.kernel, "qemu": arguments.qemu}
        named = [f"--fcvm-{name}={value}" for name, value in given.items() if value]
        _measure_suites(report, [f"--fcvm-image={image}", *_ENV_OPTIONS, *named], directory)
    print(f"\n{render_table(report)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(render_json(report), indent=2) + "\n")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="samples of every figure (default: 20)")
    parser.add_argument("--kernel", metavar="KERNEL", help="as --fcvm-kernel takes it (default: the first one found)")
    parser.add_argument(
        "--qemu", type=parse_qemu, metavar="PATH|stock", help="as --fcvm-qemu takes it (default: ours if installed)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples to a file")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be 1 or more")
    return arguments


def parse_qemu(text: str) -> Path | str:
    """Return what `Options.qemu` takes: an absolute path, or "stock"."""
    return text if text == "stock" else Path(text).resolve()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _build_image() -> Path:
    layout: Path = runpy.run_path(str(_ROOT / "tests/images/library.py"))["build_image"]("nginx", _ROOT / ".demo")
    return layout.resolve()


def _print_facts(facts: Mapping[str, str | float]) -> None:
    for name, value in facts.items():
        print(f"{name}: {value}", flush=True)


# -- clones


@contextmanager
def _opened(image: str, options: Options, shared: Path, report: Report, *, ready: str = "") -> Iterator[OpenSnapshot]:
    """Yield the snapshot to measure, and record its engine.

    With readiness over HTTP, its service has answered a request.
    """
    shared.mkdir()
    harness = Harness(options, shared_dir=shared, announce=_say)
    try:
        spec = VmSpec(image=image, env=_ENV, ready=parse_ready(ready) if ready else None)
        snapshot = harness.snapshot(spec, "benchmark")
        found, kernel = harness.choice.report, harness.provision.kernel.release
        report.host = {
            **report.host,
            "engine": str(harness.choice),
            "version": f"{found.engine} {found.version}",
            "guest kernel": kernel,
        }
        yield snapshot
    finally:
        harness.close()


def _measure_builds(report: Report, image: str, options: Options, directory: Path) -> None:
    for number in range(min(_REPEATS, report.rounds)):
        with _opened(image, replace(options, rebuild=True), directory / f"build-{number}", report) as snapshot:
            timings = snapshot.facts["timings"]
            for key in ("boot_ms", "ready_ms", "save_ms", "total_ms"):
                report.add(key, timings[key])


def _measure_rounds(
    report: Report,
    snapshot: OpenSnapshot,
    served: OpenSnapshot,
    pooled: OpenSnapshot,
    rewound: OpenSnapshot,
    podman: Podman | None,
) -> None:
    """Take one sample of each figure per round, so that a disturbance of the host affects all figures."""
    with snapshot.clone() as clone:  # fill the page cache, import modules, start the standby
        fetch_until_200(clone.url(80))
    for warmed in (served, pooled, rewound):
        with warmed.clone():
            pass
    if not rewound.has_idle:
        report.skipped["rewound VMs"] = "this QEMU cannot rewind: make qemu"
    for number in range(report.rounds):
        _say(f"round {number + 1} of {report.rounds}")
        _measure_life(report, snapshot)
        _measure_served(report, served)
        _measure_idle(report, snapshot)
        _measure_row(report, snapshot)
        _measure_pool(report, pooled)
        if rewound.has_idle:
            _measure_rewound(report, rewound)
        pooled.release()  # or the pool makes a clone during the next measurements
        if podman:
            for key, elapsed_ms in podman.round().items():
                report.add(key, elapsed_ms)


@dataclass(frozen=True)
class _Life:
    """How long after it was asked for a clone was there, had answered and was closed, in ms, and the VMM's id."""

    ready_ms: float
    answered_ms: float
    closed_ms: float
    pid: int


def _time_life(snapshot: OpenSnapshot) -> _Life:
    started = monotonic()
    with snapshot.clone() as clone:
        ready = monotonic()
        fetch_until_200(clone.url(80))
        answered, pid = monotonic(), clone.running.vm.pid
        clone.close()
        closed = monotonic()
    return _Life(*((moment - started) * 1e3 for moment in (ready, answered, closed)), pid)


def _add_life(report: Report, prefix: str, life: _Life) -> None:
    report.add(f"{prefix}_ready", life.ready_ms)
    report.add(f"{prefix}_200", life.answered_ms)
    report.add(f"{prefix}_life", life.closed_ms)


def _measure_life(report: Report, snapshot: OpenSnapshot) -> None:
    time.sleep(_BODY_S)
    life = _time_life(snapshot)
    report.add("ready", life.ready_ms)
    report.add("first_200", life.answered_ms)
    report.add("close", life.closed_ms - life.answered_ms)
    report.add("life", life.closed_ms)


def _measure_served(report: Report, served: OpenSnapshot) -> None:
    time.sleep(_BODY_S)
    started = monotonic()
    with served.clone() as clone:
        fetch_until_200(clone.url(80))
        report.add("served_200", (monotonic() - started) * 1e3)


def _measure_pool(report: Report, pooled: OpenSnapshot) -> None:
    """Measure a clone that the pool had time to make. The first clone makes the pool start on it."""
    with pooled.clone():
        time.sleep(_POOL_BODY_S)
    _add_life(report, "pool", _time_life(pooled))


def _measure_rewound(report: Report, rewound: OpenSnapshot) -> None:
    """Measure lives in a row, of which each has the VM of the one before. The first says what the VM had used."""
    before_ms = cpu_ms_of(_time_life(rewound).pid)
    for _ in range(_IN_A_ROW):
        spent = time.process_time()
        life = _time_life(rewound)
        report.add("rewound_host_cpu", (time.process_time() - spent) * 1e3)
        _add_life(report, "rewound", life)
        after_ms = cpu_ms_of(life.pid)
        report.add("rewound_vmm_cpu", after_ms - before_ms)
        before_ms = after_ms


def _measure_idle(report: Report, snapshot: OpenSnapshot) -> None:
    """Measure an idle clone. This is separate, because the measurement itself takes time."""
    time.sleep(_BODY_S)
    before = time.process_time()
    with snapshot.clone() as clone:
        spent = time.process_time() - before
        pid = clone.running.vm.pid
        report.add("vmm_cpu", cpu_ms_of(pid))
        report.add("host_cpu", spent * 1e3)
        _add_phases(report, clone, "")
        time.sleep(_IDLE_S)
        private, anonymous = private_kib_of(pid)
        report.add("private", private / 1024)
        report.add("anonymous", anonymous / 1024)
        closing = monotonic()
        clone.close()
        if not wait_until(lambda: not Path(f"/proc/{pid}").exists(), Deadline(_GONE_S), longest_interval_s=0.002):
            raise TimeoutError(f"the VMM {pid} still runs {_GONE_S:.0f} s after close()")
        report.add("gone", (monotonic() - closing) * 1e3)


def _measure_row(report: Report, snapshot: OpenSnapshot) -> None:
    """Clone and close without a pause. The first clone is not counted: its standby had time to start."""
    time.sleep(_BODY_S)
    for number in range(_IN_A_ROW):
        started = monotonic()
        clone = snapshot.clone()
        ready = monotonic()
        clone.close()
        closed = monotonic()
        if number:
            report.add("row_ready", (ready - started) * 1e3)
            report.add("row_close", (closed - ready) * 1e3)
            _add_phases(report, clone, "row_")


def _add_phases(report: Report, clone: Clone, prefix: str) -> None:
    ends = dict(clone.timeline.phases)
    report.add(f"{prefix}spawn", ends["spawn"] * 1e3)
    report.add(f"{prefix}agent", (ends["agent"] - ends["spawn"]) * 1e3)
    report.add(f"{prefix}answer", (ends["ready"] - ends["agent"]) * 1e3)


# -- podman and pytest


def _enter_podman(stack: ExitStack, layout: Path, directory: Path, report: Report) -> Podman | None:
    try:
        return stack.enter_context(start_podman(layout, directory))
    except NotHere as why:
        report.skipped["podman"] = str(why)
        _say(f"without podman: {why}")
        return None


def _measure_suites(report: Report, options: list[str], directory: Path) -> None:
    kinds = {"serial": 0, "workers": 2}
    if find_spec("xdist") is None:
        report.skipped["-n 2"] = "pytest-xdist is not installed"
        del kinds["workers"]
    suite = directory / "suite"
    write_suite(suite, report.rounds)
    for _ in range(min(_REPEATS, report.rounds)):
        for kind, workers in kinds.items():
            _say(f"{report.rounds} tests, {kind}")
            try:
                run = run_suite(suite, options, report.rounds, workers)
            except SuiteFailed as why:
                report.skipped[f"a {kind} run of pytest"] = str(why)
                continue
            report.add(f"{kind}_setup", *run.setup_ms)
            report.add(f"{kind}_teardown", *run.teardown_ms)
            report.add(f"{kind}_test", *run.test_ms)
            report.add(f"{kind}_wall", run.wall_ms)


if __name__ == "__main__":
    sys.exit(main())
