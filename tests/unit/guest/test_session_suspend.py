"""A suspended session: calls wait, the channel is idle, and the session resumes over another channel."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from pytest_fcvm.errors import GuestError, UsageProblem
from pytest_fcvm.guest.agent import Agent
from pytest_fcvm.guest.frames import FieldTag, StreamKind, decode_fields

SECRET = b"c" * 16


@pytest.fixture
def suspended(peer_and_agent: tuple[Any, Agent]) -> tuple[Agent, Any, bytes]:
    """An agent with a suspended session, the guest's end of its channel, and the resume token."""
    peer, agent = peer_and_agent
    suspending = in_background(lambda: agent.suspend(SECRET))
    request = peer.take()
    assert request.payload[0] == StreamKind.SUSPEND
    peer.reply(request.stream)
    suspending.join()
    fields = decode_fields(request.payload[5:])
    assert fields[FieldTag.SECRET] == [SECRET]
    return agent, peer, fields[FieldTag.RESUME_TOKEN][0]


def in_background(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_calls_wait_and_go_out_after_the_resume_token(cleanup: ExitStack, suspended: tuple[Agent, Any, bytes]) -> None:
    agent, old, resume_token = suspended
    answers: list[object] = []
    call = in_background(lambda: answers.append(agent.metrics(timeout_s=10)))
    assert old.take_all() == []
    host, guest = socket.socketpair()
    new = type(old)(cleanup.enter_context(guest))
    going = in_background(lambda: agent.resume_session(host, None))
    assert guest.recv(16, socket.MSG_WAITALL) == resume_token
    requests = [new.take(), new.take()]
    assert [frame.payload[0] for frame in requests] == [
        StreamKind.PERSONALISE,
        StreamKind.METRICS,
    ]  # in this order: the waiting call must not find the workload frozen
    assert requests[0].stream < requests[1].stream
    for frame in requests:
        new.reply(frame.stream)
    going.join()
    call.join()
    assert answers == [{}]
    assert old.sock.recv(1) == b""  # the earlier channel is closed


def test_calls_wait_until_the_time_is_set_and_the_workload_thaws(
    cleanup: ExitStack, suspended: tuple[Agent, Any, bytes]
) -> None:
    agent, old, resume_token = suspended
    call = in_background(lambda: agent.metrics(timeout_s=10))
    assert old.take_all() == []
    host, guest = socket.socketpair()
    new = type(old)(cleanup.enter_context(guest))
    going = in_background(lambda: agent.resume_session(host, lambda: 77))
    assert guest.recv(16, socket.MSG_WAITALL) == resume_token
    (asked,) = new.take_all()
    new.reply(asked.stream)
    requests = [new.take(), new.take()]
    assert [frame.payload[0] for frame in (asked, *requests)] == [
        StreamKind.PERSONALISE,
        StreamKind.PERSONALISE,
        StreamKind.METRICS,
    ]
    assert decode_fields(asked.payload[5:]).number(FieldTag.FLAGS) == 16
    assert decode_fields(requests[0].payload[5:]).number(FieldTag.REALTIME_NS) == 77
    assert asked.stream < requests[0].stream < requests[1].stream
    for frame in requests:
        new.reply(frame.stream)
    going.join()
    call.join()


def test_nothing_is_read_while_a_session_is_suspended(suspended: tuple[Agent, Any, bytes]) -> None:
    agent, old, _ = suspended
    old.sock.sendall(b"no frame at all" * 100)
    assert old.take_all() == []
    assert agent.session.reason is None


def test_suspending_a_suspended_session_is_refused_and_changes_nothing(
    cleanup: ExitStack, suspended: tuple[Agent, Any, bytes]
) -> None:
    agent, old, resume_token = suspended
    call = in_background(lambda: agent.metrics(timeout_s=10))
    assert old.take_all() == []
    with pytest.raises(UsageProblem, match="already"):
        agent.suspend(SECRET)
    host, guest = socket.socketpair()
    new = type(old)(cleanup.enter_context(guest))
    going = in_background(lambda: agent.resume_session(host, None))
    assert guest.recv(16, socket.MSG_WAITALL) == resume_token
    for _ in range(2):
        new.reply(new.take().stream)
    going.join()
    call.join()


def test_the_next_session_of_the_same_guest_has_the_copys_secret(suspended: tuple[Agent, Any, bytes]) -> None:
    agent, _, _ = suspended
    assert agent.session.next_secret == SECRET


def test_the_death_of_a_vm_while_suspended_is_reported(cleanup: ExitStack, suspended: tuple[Agent, Any, bytes]) -> None:
    agent, _, _ = suspended
    host, guest = socket.socketpair()
    cleanup.callback(guest.close)
    agent.session.abort(GuestError("it was killed"))
    with pytest.raises(GuestError, match="it was killed"):
        agent.resume_session(host, None)
