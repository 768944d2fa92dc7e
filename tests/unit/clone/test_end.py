"""How a clone ends, by itself and by others, and which errors its callers get."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import pytest
from fakes.agent import FakeAgent
from fakes.vm import FakeEngine

from pytest_fcvm.clone import Clone
from pytest_fcvm.errors import EngineError, FcvmError, GuestError, GuestTimeout, WorkloadExited
from pytest_fcvm.guest.frames import FieldTag, StreamKind
from pytest_fcvm.host.clock import monotonic
from pytest_fcvm.model.net import PublishedPort


def _blocked_calls(clone: Clone) -> dict[str, Callable[[], object]]:
    return {
        "exec": lambda: clone.exec(["sleep"], timeout=60),
        "wait_until_succeeds": lambda: clone.wait_until_succeeds(["fail", "1"], timeout=60),
        "wait_for_log": lambda: clone.wait_for_log("never", timeout=60),
        "pause_for_exit": lambda: clone.pause_for_exit(60),
    }


def _failure_of(call: Callable[[], object], meanwhile: Callable[[], None]) -> BaseException:
    """Run a call that blocks, do something meanwhile, and return what it raised, well before its own deadline."""
    caught: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001  the test looks at it
            caught.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(0.3)  # long enough to block in most runs; the result is the same when it has not yet
    started = monotonic()
    meanwhile()
    thread.join(30)
    assert monotonic() - started < 10
    return caught[0]


@pytest.mark.parametrize("name", ["exec", "wait_until_succeeds", "wait_for_log", "pause_for_exit"])
def test_every_wait_fails_at_once_when_the_vm_dies(name: str, clone: Clone, engine: FakeEngine) -> None:
    error = _failure_of(_blocked_calls(clone)[name], lambda: engine.vms[0].die(11))
    assert isinstance(error, EngineError)
    assert error.message == "VM web ended: signal 11"


@pytest.mark.parametrize("name", ["wait_until_succeeds", "wait_for_log", "pause_for_exit"])
def test_every_wait_for_the_workload_fails_at_once_when_it_ends(name: str, clone: Clone, guest: FakeAgent) -> None:
    guest.log(b"cannot bind\n")
    clone.wait_for_log("cannot bind", timeout=20)
    error = _failure_of(_blocked_calls(clone)[name], lambda: guest.exit_workload(code=3))
    assert isinstance(error, WorkloadExited)
    assert error.message == "the workload ended with exit code 3"
    assert error.evidence["workload log"] == "printed by the base\ncannot bind"


@pytest.mark.parametrize("name", ["exec", "wait_until_succeeds", "wait_for_log"])
def test_every_wait_fails_at_once_when_another_thread_kills_the_clone(name: str, clone: Clone) -> None:
    error = _failure_of(_blocked_calls(clone)[name], clone.kill)
    assert isinstance(error, FcvmError)
    assert error.message in ("VM web was killed", "web is closed")


def test_a_workload_that_was_killed_for_memory_says_so(clone: Clone, guest: FakeAgent) -> None:
    guest.oom_kills = 1
    guest.exit_workload(number=signal.SIGKILL)
    with pytest.raises(WorkloadExited) as caught:
        clone.pause_for_exit(20)
    said = "the workload ended with signal SIGKILL: the guest's memory ran out and its kernel killed a process"
    assert caught.value.message == said
    assert "mem=" in caught.value.hint
    assert "mem=" in clone.evidence()["memory"]


def test_the_last_words_of_a_workload_are_found_after_its_end(clone: Clone, guest: FakeAgent) -> None:
    guest.log(b"fatal: no disk\n")
    guest.exit_workload(code=1)
    assert clone.wait_for_log("fatal: (.*)", timeout=20)[1] == "no disk"


def test_evidence_waits_for_what_is_on_its_way(clone: Clone, guest: FakeAgent) -> None:
    late = threading.Timer(0.02, guest.log, (b"GET /asked 404\n",))
    late.start()
    assert clone.evidence()["workload log"].endswith("GET /asked 404")
    late.join()


def test_a_clone_that_an_error_closes_has_heard_its_last_words(clone: Clone, guest: FakeAgent) -> None:
    late = threading.Timer(0.02, guest.log, (b"GET /failed 404\n",))
    late.start()
    with pytest.raises(ZeroDivisionError), clone:
        raise ZeroDivisionError
    late.join()
    assert clone.evidence()["workload log"].endswith("GET /failed 404")


def test_a_closed_clone_says_so(clone: Clone, engine: FakeEngine) -> None:
    clone.close()
    clone.close()
    assert engine.vms[0].exit is not None
    assert repr(clone) == "<Clone web of None on fake, closed>"
    for call in (lambda: clone.exec(["echo"]), clone.logs, clone.pause, lambda: clone.endpoint(80), clone.console):
        with pytest.raises(GuestError, match="web is closed") as caught:
            call()
        assert caught.value.hint == "ask for a new clone"


def test_a_paused_clone_refuses_calls_until_it_is_resumed_with_the_time_of_day(
    clone: Clone, engine: FakeEngine, guest: FakeAgent
) -> None:
    clone.pause()
    assert repr(clone) == "<Clone web of None on fake, paused>"
    with pytest.raises(GuestError, match="web is paused") as caught:
        clone.exec(["echo"])
    assert caught.value.hint == "call resume() first"
    clone.resume()
    assert clone.succeed(["echo", "again"]) == "again\n"
    assert engine.vms[0].calls == ["start", "pause", "resume"]
    asked, sent = [fields for kind, fields in guest.executed if kind is StreamKind.PERSONALISE]
    assert (asked.keys(), sent.keys()) == ({FieldTag.FLAGS}, {FieldTag.REALTIME_NS})
    assert sent.number(FieldTag.REALTIME_NS) > 0


def test_a_reset_clone_is_a_fresh_vm_behind_the_same_ports(
    make_clone: Callable[..., Clone], engine: FakeEngine
) -> None:
    clone = make_clone(publish=(PublishedPort(guest_port=8000, host_port=18000),))
    before = (clone.endpoint(8000), clone.endpoint(80))
    clone.pause()
    clone.reset()
    old, new = engine.vms
    assert old.exit is not None
    assert new.exit is None
    assert (clone.endpoint(8000), clone.endpoint(80)) == before
    assert clone.succeed(["echo", "fresh"]) == "fresh\n"


def test_a_clone_is_a_context_manager(make_clone: Callable[..., Clone], engine: FakeEngine) -> None:
    with pytest.raises(ZeroDivisionError), make_clone():
        raise ZeroDivisionError
    assert engine.vms[0].exit is not None


def test_cleanups_run_in_reverse_even_when_one_fails(clone: Clone, engine: FakeEngine) -> None:
    order: list[str] = []

    def fail() -> None:
        order.append("second")
        raise OSError("it is stuck")

    clone.running.add_cleanup([lambda: order.append("first"), fail])
    clone.running.add_cleanup(
        [lambda: order.append(f"third, the VM {'lives' if engine.vms[0].exit is None else 'died'}")]
    )
    with pytest.raises(OSError, match="it is stuck"):
        clone.close()
    assert order == ["third, the VM died", "second", "first"]


def test_evidence_is_what_a_person_wants_to_see_and_nothing_empty(
    clone: Clone, engine: FakeEngine, guest: FakeAgent
) -> None:
    engine.vms[0].vmm_log_path.write_text("qemu: \x1b[31mbad\n")
    guest.log(b"listening\n")
    clone.wait_for_log("listening", timeout=20)
    clone.running.timeline.mark("agent", clone.running.timeline.start + 0.05)
    evidence = clone.evidence()
    assert evidence == {
        "workload log": "printed by the base\nlistening",
        "console": "[    0.000000] Linux version 6.1",
        "VMM log": "qemu: \\x1b[31mbad",
        "timeline": "agent 50.0 ms",
    }
    engine.vms[0].vmm_log_path.write_text(" \n")
    assert "VMM log" not in clone.evidence()


@pytest.mark.parametrize(("how", "code"), [({"code": 0}, 0), ({"code": 3}, 3), ({"number": signal.SIGTERM}, 143)])
def test_a_workload_that_ends_as_it_may_fails_nobody(
    how: dict[str, int], code: int, make_clone: Callable[..., Clone], engine: FakeEngine
) -> None:
    clone, guest = make_clone(expected_exit_code=code), engine.vms[-1].agent
    assert clone.exit_status is None
    guest.log(b"migrated\n")
    guest.exit_workload(**how)
    assert clone.wait(20).exit_code == code
    assert clone.logs().endswith("migrated\n")
    clone.pause_for_exit(0.1)
    assert clone.succeed(["echo", "alive"]) == "alive\n"
    with pytest.raises(GuestTimeout, match="did not succeed within"):
        clone.wait_until_succeeds(["fail", "1"], timeout=0.3)
    started = monotonic()
    with pytest.raises(WorkloadExited, match="no line matched 'never', and the workload ended with") as caught:
        clone.wait_for_log("never", timeout=60)
    assert "exit:0" not in caught.value.hint
    assert monotonic() - started < 10


def test_another_end_than_the_expected_one_names_both(make_clone: Callable[..., Clone], engine: FakeEngine) -> None:
    clone = make_clone(expected_exit_code=0)
    engine.vms[-1].agent.exit_workload(code=3)
    with pytest.raises(WorkloadExited, match="the workload ended with exit code 3, not with 0"):
        clone.pause_for_exit(20)
    assert clone.wait(20).exit_code == 3


def test_an_end_that_the_snapshot_has_seen_fails_nobody(make_clone: Callable[..., Clone], engine: FakeEngine) -> None:
    prepare = engine.prepare_guest

    def end(agent: FakeAgent) -> None:
        prepare(agent)
        agent.exit_workload(code=3)

    engine.prepare_guest = end
    clone = make_clone()
    assert clone.wait(0).exit_code == 3
    clone.pause_for_exit(0.1)
    with pytest.raises(WorkloadExited, match="no line matched 'never', and the workload ended with exit code 3"):
        clone.wait_for_log("never", timeout=60)


def test_a_wait_for_a_workload_that_goes_on_ends_with_what_it_printed(clone: Clone, guest: FakeAgent) -> None:
    guest.log(b"still at it\n")
    clone.wait_for_log("still", timeout=20)
    with pytest.raises(GuestTimeout, match="the workload did not end within") as caught:
        clone.wait(0.2)
    assert caught.value.evidence["workload log"].endswith("still at it")


def test_the_error_for_an_exit_with_0_mentions_one_shot_images(clone: Clone, guest: FakeAgent) -> None:
    guest.exit_workload(code=0)
    with pytest.raises(WorkloadExited, match="ended with exit code 0") as caught:
        clone.pause_for_exit(20)
    assert caught.value.hint.endswith('or ready="exit:0" where it is to end')
