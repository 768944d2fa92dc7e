"""The cold path, from a booted base to the files of a snapshot, and every way in which it can fail."""

from __future__ import annotations

import dataclasses
import itertools
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes.agent import FakeAgent
from fakes.agent_wire import FakeStream
from fakes.vm import FakeEngine, FakeVm, Service, at_verb

from pytest_fcvm.clone import Clone
from pytest_fcvm.errors import (
    CommandFailed,
    EngineError,
    FcvmError,
    GuestError,
    GuestTimeout,
    UsageProblem,
    WorkloadExited,
)
from pytest_fcvm.guest.frames import FieldTag, StreamKind
from pytest_fcvm.guest.streams import CallFailed
from pytest_fcvm.host.clock import monotonic
from pytest_fcvm.image.config import ImageConfig
from pytest_fcvm.model.specs import MappedPath, Prepare, ReadyMode, ReadySpec
from pytest_fcvm.snapshot import SnapshotInputs, build_snapshot

_NEVER = ReadySpec(mode=ReadyMode.LOG, text="never")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where the snapshot goes."""
    directory = tmp_path / "entry"
    directory.mkdir()
    return directory


def _build(inputs: SnapshotInputs, directory: Path) -> dict[str, Any]:
    return build_snapshot(inputs, directory, lambda _phase: None)


def _failure(inputs: SnapshotInputs, directory: Path, kind: type[FcvmError]) -> FcvmError:
    with pytest.raises(kind) as caught:
        _build(inputs, directory)
    return caught.value


def _kinds(agent: FakeAgent) -> list[str]:
    return [kind.name for kind, _ in agent.executed]


def test_a_base_is_configured_filled_started_verified_frozen_saved_and_killed_in_that_order(
    make_inputs: Callable[..., SnapshotInputs], directory: Path, engine: FakeEngine, tmp_path: Path
) -> None:
    (tmp_path / "app.conf").write_text("x=1")
    phases: list[str] = []
    inputs = make_inputs(map=(MappedPath(host=tmp_path / "app.conf", guest="/etc/app.conf", read_only=True),))
    facts = build_snapshot(inputs, directory, phases.append)
    (vm,) = engine.vms
    kinds = [kind for kind in _kinds(vm.agent) if kind not in ("LOGS", "CONNECT", "LISTENING", "METRICS")]
    assert kinds == ["CONFIGURE", "TAR_IN", "START", "SYNC", "QUIESCE"]
    assert _kinds(vm.agent)[-1] == "QUIESCE"
    assert (vm.calls, vm.exit is not None) == (["snapshot"], True)
    assert ((directory / "memory").read_bytes(), (directory / "state").read_bytes()) == (b"memory", b"state")
    assert phases == [
        "booting the kernel",
        "starting the workload",
        "waiting until it is ready (tcp:80)",
        "taking the snapshot",
    ]
    assert (facts["client_port"], len(facts["secret"])) == (80, 32)
    assert (tmp_path / "guest/etc/app.conf").read_text() == "x=1"


def test_the_workload_is_started_as_image_and_spec_say(
    make_inputs: Callable[..., SnapshotInputs], directory: Path, engine: FakeEngine
) -> None:
    _build(
        make_inputs(command=("serve", "-v"), env={"LEVEL": "spec", "TOKEN": "t"}, user="root", workdir="/w"), directory
    )
    (fields,) = [fields for kind, fields in engine.vms[0].agent.executed if kind is StreamKind.START]
    assert fields.texts(FieldTag.ARG) == ["/entry", "serve", "-v"]
    assert fields.texts(FieldTag.ENV) == ["HOSTNAME=fcvm-base", "PATH=/bin", "LEVEL=spec", "TOKEN=t"]
    assert (fields.text(FieldTag.CWD), fields.text(FieldTag.USER)) == ("/w", "root")


def test_the_guest_is_configured_as_image_and_spec_say(
    make_inputs: Callable[..., SnapshotInputs], directory: Path, engine: FakeEngine
) -> None:
    volumes = ("/data/in", "relative", "/data", "/srv//../var/lib/x/", "/", "/etc/conf", "/proc", "/dev/shm", "/sys/x")
    config = ImageConfig(entrypoint=("/entry",), volumes=volumes)
    said = {"hostname": "db", "shm_mib": 64, "ulimits": {"nofile": (10, -1)}, "sysctls": {"vm.swappiness": "0"}}
    _build(make_inputs(image_config=config, **said), directory)
    (fields,) = [fields for kind, fields in engine.vms[0].agent.executed if kind is StreamKind.CONFIGURE]
    assert fields.texts(FieldTag.VOLUME) == ["/data", "/data/in", "/relative", "/var/lib/x"]
    assert fields.text(FieldTag.HOSTNAME) == "db"
    assert fields.number(FieldTag.SHM_MIB) == 64
    assert fields.texts(FieldTag.ULIMIT) == ["7:10:-1"]
    assert fields.texts(FieldTag.SYSCTL) == ["vm.swappiness=0"]
    assert fields.texts(FieldTag.HOSTS) == ["10.0.2.2 host.fcvm"]


def test_a_kernel_setting_that_is_refused_says_where_it_was_asked_for(
    make_inputs: Callable[..., SnapshotInputs], directory: Path, engine: FakeEngine
) -> None:
    prepare = engine.prepare_guest

    def refuse(agent: FakeAgent) -> None:
        prepare(agent)
        agent.refusals[StreamKind.CONFIGURE] = (2, "the guest's kernel has no sysctl a.b")

    engine.prepare_guest = refuse
    error = _failure(make_inputs(sysctls={"a.b": "1"}), directory, CallFailed)
    assert "the guest's kernel has no sysctl a.b" in error.message
    assert "--fcvm-sysctl" in error.hint


def test_an_image_without_a_command_is_a_usage_problem(
    make_inputs: Callable[..., SnapshotInputs], directory: Path
) -> None:
    error = _failure(make_inputs(image_config=ImageConfig()), directory, UsageProblem)
    assert (error.message, error.hint) == ("registry/web:1 names no command to run", "give one with --fcvm-command")


@pytest.mark.parametrize(
    ("ready", "listening", "port"),
    [
        (ReadySpec(mode=ReadyMode.AGENT), {80: 0, 443: 1}, 443),
        (ReadySpec(mode=ReadyMode.AGENT), {80: 2, 443: 0}, None),
        (ReadySpec(mode=ReadyMode.HTTP, port=80, text="/"), {80: 1}, 80),
    ],
)
def test_clones_are_verified_on_the_port_that_answered_or_the_first_exposed_one_that_listens(
    ready: ReadySpec,
    listening: dict[int, int],
    port: int | None,
    make_inputs: Callable[..., SnapshotInputs],
    directory: Path,
    engine: FakeEngine,
) -> None:
    serve = engine.prepare_guest

    def listen(agent: FakeAgent) -> None:
        serve(agent)
        agent.listening = listening

    engine.prepare_guest = listen
    image = ImageConfig(cmd=("serve",), exposed_ports=((53, "udp"), (80, "tcp"), (443, "tcp")))
    assert _build(make_inputs(ready=ready, image_config=image), directory)["client_port"] == port


def test_a_ready_workload_that_still_works_is_waited_for_until_it_rests(
    make_inputs: Callable[..., SnapshotInputs], directory: Path, engine: FakeEngine
) -> None:
    serve = engine.prepare_guest
    used = iter([100_000, 300_000, 500_000, 500_010])

    class Metrics(dict[str, str]):
        def items(self) -> Any:
            return {"workload_cpu_us": str(next(used))}.items()

    def work(agent: FakeAgent) -> None:
        serve(agent)
        agent.metrics = Metrics()

    engine.prepare_guest = work
    _build(make_inputs(), directory)
    assert list(used) == []


def test_a_workload_that_never_rests_is_frozen_all_the_same(
    make_inputs: Callable[..., SnapshotInputs], directory: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_fcvm.snapshot.builder._QUIET_DEADLINE_S", 0.3)
    serve, used = engine.prepare_guest, itertools.count(0, 1_000_000)

    class Metrics(dict[str, str]):
        def items(self) -> Any:
            return {"workload_cpu_us": str(next(used))}.items()

    def work(agent: FakeAgent) -> None:
        serve(agent)
        agent.metrics = Metrics()

    engine.prepare_guest = work
    assert _build(make_inputs(), directory)["client_port"] == 80


def test_a_guest_without_cpu_figures_counts_as_resting(
    make_inputs: Callable[..., SnapshotInputs], directory: Path, engine: FakeEngine
) -> None:
    serve = engine.prepare_guest
    engine.prepare_guest = lambda agent: (serve(agent), agent.metrics.clear())[0]
    assert _build(make_inputs(), directory)["client_port"] == 80


def test_what_the_workload_printed_is_kept_beside_the_snapshot(
    make_inputs: Callable[..., SnapshotInputs], directory: Path, engine: FakeEngine
) -> None:
    serve = engine.prepare_guest
    engine.prepare_guest = lambda agent: (serve(agent), agent.log(b"listening on 80\n"))[0]
    _build(make_inputs(ready=ReadySpec(mode=ReadyMode.LOG, text="^listening")), directory)
    assert (directory / "base.log").read_bytes() == b"listening on 80\n"


# Prepare


def test_a_prepare_function_works_on_the_ready_base(
    make_inputs: Callable[..., SnapshotInputs], directory: Path, engine: FakeEngine, service: Service
) -> None:
    seen = []

    def prepare(base: Clone) -> None:
        seen.append(base.succeed(["echo", "loaded"]))
        seen.append(base.http(80).get("/rows").text)

    _build(make_inputs(prepare=Prepare(prepare)), directory)
    assert seen == ["loaded\n", "hello"]
    assert service.requests[-1].startswith(b"GET /rows")
    assert _kinds(engine.vms[0].agent)[-1] == "QUIESCE"


def test_a_connection_that_prepare_left_open_is_not_in_the_snapshot(
    make_inputs: Callable[..., SnapshotInputs], directory: Path, engine: FakeEngine
) -> None:
    connections = []

    def prepare(base: Clone) -> None:
        connections.append(socket.create_connection(base.endpoint(80), timeout=20))
        connections[0].sendall(b"x")
        assert connections[0].recv(1 << 16)

    serve, open_at_quiesce = engine.prepare_guest, []

    def watch(agent: FakeAgent) -> None:
        serve(agent)
        at_verb(
            agent, StreamKind.QUIESCE, lambda: open_at_quiesce.extend(stream.kind for stream in agent.streams.values())
        )

    engine.prepare_guest = watch
    _build(make_inputs(prepare=Prepare(prepare)), directory)
    assert StreamKind.CONNECT not in open_at_quiesce
    with connections[0] as connection, pytest.raises(ConnectionResetError):
        connection.recv(1 << 16)


def test_a_prepare_command_goes_to_the_guests_shell(
    make_inputs: Callable[..., SnapshotInputs], directory: Path, engine: FakeEngine
) -> None:
    ran = []

    async def shell(stream: FakeStream) -> int:
        ran.append(stream.argv)
        return 0

    serve = engine.prepare_guest
    engine.prepare_guest = lambda agent: (serve(agent), agent.programs.update({"/bin/sh": shell}))[0]
    _build(make_inputs(prepare="psql < /rows.sql"), directory)
    assert ran == [["/bin/sh", "-c", "psql < /rows.sql"]]


def test_a_prepare_function_that_raises_is_a_failed_build_with_its_traceback(
    make_inputs: Callable[..., SnapshotInputs], directory: Path, engine: FakeEngine
) -> None:
    def load_rows(_base: Clone) -> None:
        raise LookupError("no rows today")

    error = _failure(make_inputs(prepare=Prepare(load_rows)), directory, GuestError)
    assert error.message == "the prepare function load_rows failed: LookupError: no rows today"
    assert "test_builder.py" in error.evidence["prepare"]
    assert "console" in error.evidence
    assert engine.vms[0].exit is not None


def test_errors_of_the_guest_in_a_prepare_function_stay_what_they_are(
    make_inputs: Callable[..., SnapshotInputs], directory: Path
) -> None:
    error = _failure(make_inputs(prepare=Prepare(lambda base: base.succeed(["fail", "3"]))), directory, CommandFailed)
    assert error.message == "fail 3 failed (exit code 3): it went wrong"


def test_a_service_that_prepare_broke_is_not_snapshotted(
    make_inputs: Callable[..., SnapshotInputs], directory: Path, engine: FakeEngine
) -> None:
    def stop(_base: Clone) -> None:
        engine.vms[0].agent.listening[80] = 0

    error = _failure(make_inputs(prepare=Prepare(stop), ready_timeout_s=0.3), directory, GuestTimeout)
    assert re.search("nothing listens on port", error.message)


# Failures


def test_a_workload_that_ends_before_it_is_ready_fails_the_build_at_once_with_its_output(
    make_inputs: Callable[..., SnapshotInputs], directory: Path, engine: FakeEngine
) -> None:
    serve = engine.prepare_guest

    def die(agent: FakeAgent) -> None:
        serve(agent)
        at_verb(agent, StreamKind.START, lambda: (agent._log(b"cannot bind\n"), agent._exit_workload(3, None)))

    engine.prepare_guest = die
    started = monotonic()
    error = _failure(make_inputs(ready=_NEVER), directory, WorkloadExited)
    assert monotonic() - started < 20
    assert error.message == "the workload ended with exit code 3"
    assert error.evidence["workload log"] == "cannot bind"
    assert engine.vms[0].exit is not None


def test_a_service_that_is_never_ready_fails_at_the_deadline_with_log_and_console(
    make_inputs: Callable[..., SnapshotInputs], directory: Path, engine: FakeEngine
) -> None:
    serve = engine.prepare_guest
    engine.prepare_guest = lambda agent: (serve(agent), agent.log(b"starting\n"))[0]
    error = _failure(make_inputs(ready=_NEVER, ready_timeout_s=0.3), directory, GuestTimeout)
    assert re.fullmatch("not ready after [01] s: log:never: no such line in the workload's log", error.message)
    assert set(error.evidence) >= {"workload log", "console", "timeline"}
    assert "state" not in {path.name for path in directory.iterdir()}


def test_a_vm_that_dies_meanwhile_fails_the_build_at_once(
    make_inputs: Callable[..., SnapshotInputs], directory: Path, engine: FakeEngine
) -> None:
    def die(_base: Clone) -> None:
        engine.vms[0].die(11)

    error = _failure(make_inputs(prepare=Prepare(die)), directory, EngineError)
    assert error.message == "VM base ended: signal 11"


def test_a_boot_of_which_nothing_is_seen_is_tried_once_more(
    make_inputs: Callable[..., SnapshotInputs], directory: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_fcvm.snapshot.builder._SILENT_S", 0.2)
    _hang_boots(engine, 1)
    phases: list[str] = []
    build_snapshot(make_inputs(), directory, phases.append)
    assert phases[1] == "booting the kernel again (the first boot hung)"
    assert [vm.exit is not None for vm in engine.vms] == [True, True]


def test_two_boots_of_which_nothing_is_seen_are_an_engine_error(
    make_inputs: Callable[..., SnapshotInputs], directory: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_fcvm.snapshot.builder._SILENT_S", 0.2)
    _hang_boots(engine, 9)
    error = _failure(make_inputs(), directory, EngineError)
    assert error.message == "the guest's kernel printed nothing for 0 s"
    assert len(engine.vms) == 2


def _hang_boots(engine: FakeEngine, times: int) -> None:
    def hang(vm: FakeVm) -> None:
        if len(engine.vms) <= times:
            vm.console_path.write_bytes(b"")
            vm.agent.wait_for_secret(b"nobody knows this")

    engine.change_vm = hang


def test_a_vm_that_dies_while_it_boots_is_reported_with_its_console(
    make_inputs: Callable[..., SnapshotInputs], directory: Path, engine: FakeEngine
) -> None:
    def panic(vm: FakeVm) -> None:
        vm.console_path.write_bytes(b"Kernel panic - not syncing\n")
        vm.die(6)

    engine.change_vm = panic
    error = _failure(make_inputs(), directory, EngineError)
    assert error.message == "VM base ended: signal 6"
    assert error.evidence["console"] == "Kernel panic - not syncing"


def test_inputs_are_frozen(make_inputs: Callable[..., SnapshotInputs]) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_inputs().kernel_digest = "other"  # type: ignore[misc]
