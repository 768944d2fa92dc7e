"""Requests to the helper programs `switch.py` and `netns/server.py`, and their answers.

    request    (number, operation, {argument: value}), with descriptors; number 0 gets no answer
    answer     (number, error, value, count), with `count` descriptors; `error` is "" when the operation worked

Each is one packet in the format of the supervisor's guard, see `host/supervisor/messages.py`.
"""

from __future__ import annotations

# The helper programs import this module when they start, so it imports nothing slow.
import errno
import os
from typing import Any, NamedTuple

from pytest_fcvm.host.supervisor import messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from socket import socket
    from typing import TypeAlias

    Result: TypeAlias = tuple[Any, Sequence[int]] | None  # a value and descriptors
    Operation: TypeAlias = Callable[..., Result]

__all__ = ["CONTROL_FD", "Answer", "receive_answer", "send_request", "serve_request"]

CONTROL_FD = messages.CONTROL  # of a helper program; requests come from it


class Answer(NamedTuple):
    """An answer. It is not `is_whole` when this process could not open all its descriptors."""

    number: int
    error: str
    value: Any
    descriptors: list[int]
    is_whole: bool


def send_request(
    control: socket, number: int, operation: str, arguments: Mapping[str, Any], descriptors: Sequence[int] = ()
) -> None:
    """Send a request. Raise OSError."""
    messages.send(control, (number, operation, _plain(arguments)), descriptors)


def receive_answer(control: socket) -> Answer:
    """Receive an answer and its descriptors, close-on-exec. Raise OSError, also when the program has ended."""
    message, descriptors = messages.receive(control)
    if message is None:
        raise BrokenPipeError
    number, error, value, count = message
    return Answer(number, error, value, descriptors, len(descriptors) == count)


def serve_request(control: socket, operations: Mapping[str, Operation]) -> bool:
    """Do what the next request asks for, and answer it. Return False when the control socket has ended.

    An operation takes the descriptors of the request, which become its own, and the arguments by name. It returns what
    goes into the answer, whose descriptors are closed here, or raises OSError.
    """
    request, received = messages.receive(control)
    if request is None:
        return False
    number, name, arguments = request
    error, result = "", None
    try:
        result = _find(operations, name)(*received, **arguments)
    except OSError as failure:
        error = f"{failure.filename or name}: {failure.strerror}"
    value, sent = result or (None, ())
    if number:
        messages.send(control, (number, error, value, len(sent)), sent)
    for descriptor in sent:
        os.close(descriptor)
    return True


def _find(operations: Mapping[str, Operation], name: str) -> Operation:
    if name not in operations:
        raise OSError(errno.EINVAL, "there is no such request", name)
    return operations[name]


def _plain(value: Any) -> Any:
    """Return a copy of a value that has no subclass of str, int or float, such as an enum: a message takes none."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value]
