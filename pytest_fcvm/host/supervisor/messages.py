"""Messages between the supervisor in pytest and its spawner: one marshalled tuple per packet, with descriptors.

Both ends are the same interpreter, so marshal works; `json` would cost 9 ms of start-up, because it imports `re`. All
strings are bytes, so that the locale does not matter.

    control, to the spawner    (OP_SPAWN, id, argv, stdout, cwd, env or None, nice, targets, owned_dir or None)
                               with one descriptor per target
                               (OP_END, id): kill the process, and remove its directory after its end
    control, back              (0, 0, 0, isolation) once, at the start
                               (id, pid, 0, b"") with a pidfd, or (id, 0, errno, what), answers a spawn
    events, back               (id, exit code or -signal), or (id, None) for a process that never started
"""

from __future__ import annotations

# The guard imports this module and its neighbours. They import C modules only: `socket`, `signal` and `typing` cost 12,
# 6 and 5 ms.
import _socket
import fcntl
import marshal
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from socket import socket
    from typing import Any, TypeAlias

    Message: TypeAlias = tuple[Any, ...]

__all__ = [
    "CONTROL",
    "EVENTS",
    "EXTRA_DIR",
    "MESSAGE_LIMIT",
    "OP_END",
    "OP_SPAWN",
    "PYTEST",
    "duplicate_above",
    "receive",
    "send",
]

CONTROL, EVENTS, PYTEST = 3, 4, 5  # descriptors of the guard on entry; the last is a pidfd of pytest
EXTRA_DIR = b"extra-dir"  # a link in the run directory to the other directory that the guard removes
OP_SPAWN, OP_END = 0, 1
MESSAGE_LIMIT = 1 << 20  # bytes

_DESCRIPTOR = 4  # bytes of an int in SCM_RIGHTS
_MOST_DESCRIPTORS = 253  # SCM_MAX_FD


def duplicate_above(plan: Mapping[int, int]) -> dict[int, int]:
    """Return the plan {target: source} with all sources above all targets, so that no dup2 overwrites a later source.

    Lower sources are duplicated, close-on-exec. The caller closes the duplicates.
    """
    floor = max(plan, default=0) + 1
    moved: dict[int, int] = {}
    try:
        for source in plan.values():
            if source not in moved:
                moved[source] = source if source >= floor else fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, floor)
    except BaseException:
        for source, copied in moved.items():
            if copied != source:
                os.close(copied)
        raise
    return {target: moved[source] for target, source in plan.items()}


def send(peer: _socket.socket | socket, message: Message, descriptors: Sequence[int] = ()) -> None:
    """Send one message with descriptors. Raise OSError, ConnectionError when the other end is closed."""
    packed = b"".join(number.to_bytes(_DESCRIPTOR, sys.byteorder) for number in descriptors)
    ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed)] if packed else []
    peer.sendmsg([marshal.dumps(message)], ancillary)


def receive(peer: _socket.socket | socket) -> tuple[Message | None, list[int]]:
    """Receive one message and its descriptors, close-on-exec. Return None when the other end is closed."""
    space = _socket.CMSG_SPACE(_MOST_DESCRIPTORS * _DESCRIPTOR)
    try:
        data, ancillary, _, _ = peer.recvmsg(MESSAGE_LIMIT, space, _socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:
        return None, []
    descriptors = [
        int.from_bytes(packed[at : at + _DESCRIPTOR], sys.byteorder)
        for level, kind, packed in ancillary
        if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS)
        for at in range(0, len(packed) - _DESCRIPTOR + 1, _DESCRIPTOR)
    ]
    return (marshal.loads(data) if data else None), descriptors  # noqa: S302 - the other end is ourselves
