from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from pytest_fcvm.engine.qemu.monitor import CommandRefused, Monitor, MonitorGone, compose
from pytest_fcvm.errors import EngineError


def resumed(event: Any) -> bool:
    return event.name == "RESUME"


def test_a_command_is_written_in_as_few_bytes_as_json_allows() -> None:
    assert compose("stop") == '{"execute":"stop"}'
    assert compose("migrate", {"uri": "fd:s"}) == '{"execute":"migrate","arguments":{"uri":"fd:s"}}'


def test_a_command_returns_what_qemu_returned_although_a_greeting_and_events_came_first(qmp: Any) -> None:
    def answer(*_: object) -> object:
        qmp.event("RTC_CHANGE", offset=0)
        return {"status": "running"}

    qmp.answers["query-status"] = answer
    assert Monitor(qmp.client).execute("query-status") == {"status": "running"}


def test_a_refusal_has_qemus_message(qmp: Any) -> None:
    def refuse(*_: object) -> object:
        raise LookupError("Could not open 'x': No such file")

    qmp.answers["migrate"] = refuse
    with pytest.raises(CommandRefused, match=r"QEMU refused migrate: Could not open 'x': No such file"):
        Monitor(qmp.client).execute("migrate", {"uri": "file:x"})


def test_early_commands_reach_qemu_in_order_and_their_replies_are_not_mixed_up(qmp: Any) -> None:
    monitor = Monitor(qmp.client)
    qmp.answers["query-name"] = lambda *_: {"name": "x"}
    monitor.send_early([("qmp_capabilities", {}), ("migrate-incoming", {"uri": "fd:5"})])
    assert monitor.execute("query-name") == {"name": "x"}
    assert qmp.received == [("qmp_capabilities", {}), ("migrate-incoming", {"uri": "fd:5"}), ("query-name", {})]


def test_the_refusal_of_an_early_command_is_raised_by_the_next_call(qmp: Any) -> None:
    def refuse(*_: object) -> object:
        raise LookupError("no such capability")

    qmp.answers["migrate-set-capabilities"] = refuse
    monitor = Monitor(qmp.client)
    monitor.send_early([("qmp_capabilities", {}), ("migrate-set-capabilities", {})])
    with pytest.raises(CommandRefused, match="refused migrate-set-capabilities: no such capability"):
        monitor.wait_for_event(resumed, "resume", 5)


def test_an_event_that_came_before_anybody_waited_is_not_missed(qmp: Any) -> None:
    monitor = Monitor(qmp.client)
    qmp.answers["cont"] = lambda *_: qmp.event("RESUME") or {}
    monitor.execute("cont")
    assert monitor.wait_for_event(resumed, "resume", 5).name == "RESUME"


def test_an_event_is_waited_for_and_carries_its_data(qmp: Any) -> None:
    monitor = Monitor(qmp.client)
    threading.Timer(0.05, lambda: qmp.event("MIGRATION", status="completed")).start()
    event = monitor.wait_for_event(lambda event: event.name == "MIGRATION", "save", 5)
    assert event.data == {"status": "completed"}


def test_a_line_in_pieces_is_one_message(qmp: Any) -> None:
    monitor = Monitor(qmp.client)

    def drip(*_: object) -> None:
        for piece in (b'{"re', b'turn": {"a"', b": 1}}\r", b"\n"):
            qmp.say_raw(piece)

    qmp.answers["query-a"] = drip
    assert monitor.execute("query-a") == {"a": 1}


@pytest.mark.parametrize("last_output", [b"", b'{"return": {"stat'])
def test_the_end_of_qemu_ends_a_call_at_once_even_in_the_middle_of_a_reply(qmp: Any, last_output: bytes) -> None:
    monitor = Monitor(qmp.client)

    def die(*_: object) -> None:
        qmp.say_raw(last_output)
        qmp.hang_up()

    qmp.answers["stop"] = die
    with pytest.raises(MonitorGone):
        monitor.execute("stop", timeout_s=600)


def test_a_command_without_answer_ends_at_its_deadline_and_its_late_reply_is_not_the_next_ones(qmp: Any) -> None:
    monitor = Monitor(qmp.client)
    qmp.answers["stop"] = lambda *_: None
    with pytest.raises(EngineError, match=r"QEMU did not answer stop within 0\.1 s"):
        monitor.execute("stop", timeout_s=0.1)
    qmp.answers["query-status"] = lambda *_: {"status": "paused"}
    qmp.say({"return": {"late": True}})
    assert monitor.execute("query-status") == {"status": "paused"}


def test_an_event_that_does_not_come_is_named_at_the_deadline(qmp: Any) -> None:
    with pytest.raises(EngineError, match=r"QEMU did not bring the clone to life within 0\.1 s"):
        Monitor(qmp.client).wait_for_event(resumed, "bring the clone to life", 0.1)


def test_descriptors_are_passed_with_their_command(qmp: Any, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("state")
    fd = os.open(tmp_path / "state", os.O_RDONLY)
    try:
        Monitor(qmp.client).execute("getfd", {"fdname": "state"}, fds=[fd])
    finally:
        os.close(fd)
    assert qmp.received == [("getfd", {"fdname": "state"})]
    assert os.read(qmp.fds[0], 10) == b"state"
    os.close(qmp.fds[0])


def test_threads_take_turns_and_each_gets_its_own_answer(qmp: Any) -> None:
    qmp.answers["echo"] = lambda _, arguments: arguments["n"]
    monitor = Monitor(qmp.client)
    got: dict[int, object] = {}
    threads = [
        threading.Thread(target=lambda n=n: got.__setitem__(n, monitor.execute("echo", {"n": n}))) for n in range(1, 21)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {n: n for n in range(1, 21)}


def test_closing_wakes_a_waiting_thread_although_somebody_else_holds_the_far_end(qmp: Any) -> None:
    monitor = Monitor(qmp.client)
    raised: list[BaseException] = []
    greeted = threading.Event()
    qmp.answers["wait"] = lambda *_: greeted.set()

    def call() -> None:
        try:
            monitor.execute("wait", timeout_s=600)
        except MonitorGone as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    assert greeted.wait(5)
    monitor.close()
    thread.join(5)
    assert raised
    with pytest.raises(MonitorGone):
        monitor.execute("stop")


def test_a_line_that_is_not_json_is_an_engine_error(qmp: Any) -> None:
    monitor = Monitor(qmp.client)
    qmp.answers["stop"] = lambda *_: qmp.say_raw(b"Segmentation fault\n")
    with pytest.raises(EngineError, match="not JSON: b'Segmentation fault'"):
        monitor.execute("stop")
