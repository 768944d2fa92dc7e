"""The streams that a session begins or ends with."""

from __future__ import annotations

from collections.abc import Sequence

from pytest_fcvm.guest.bodies import Body, identity_body, join_body
from pytest_fcvm.guest.frames import FieldTag, StreamKind
from pytest_fcvm.guest.session import Opening, Session
from pytest_fcvm.guest.streams import Sink, Stream
from pytest_fcvm.host.clock import Deadline
from pytest_fcvm.model.guest import Identity
from pytest_fcvm.model.net import Attachment

__all__ = ["logs_opening", "open_session", "personalise_opening", "quiesce_opening", "tar_in_opening"]

_ONLY_UNSENT, _AT_PLACE, _HIDES = 8, 16, 32


def open_session(
    session: Session,
    identity: Identity | None,
    attachments: Sequence[Attachment],
    log_sink: Sink | None,
    deadline: Deadline,
) -> Stream | None:
    """Start a session with its first streams, in one write, and return the log's stream."""
    opening = [
        Opening(kind=StreamKind.JOIN, what="join", fields=join_body((), attachment, f"eth{number}"))
        for number, attachment in enumerate(attachments, start=1)
    ]
    if identity is not None:
        opening.append(personalise_opening(identity))
    if log_sink is not None:
        opening.append(logs_opening(log_sink, only_unsent=identity is not None))
    streams: Sequence[Stream] = session.start(opening)
    for stream in streams[: len(attachments)]:
        stream.wait_reply(deadline)
    if identity is not None:
        streams[len(attachments)].wait_reply(deadline)
    else:
        session.wait_until_welcome(deadline)
    return streams[-1] if log_sink is not None else None


def personalise_opening(identity: Identity) -> Opening:
    """Return the stream that gives the guest its identity."""
    return Opening(kind=StreamKind.PERSONALISE, what="personalise", fields=identity_body(identity))


def quiesce_opening(next_secret: bytes, *, keeps_peer: bool) -> Opening:
    """Return the stream that ends a session, as in `Agent.quiesce`."""
    body: Body = [(FieldTag.SECRET, next_secret), *([(FieldTag.PEER_GATEWAY, 1)] if keeps_peer else [])]
    return Opening(kind=StreamKind.QUIESCE, what="quiesce", fields=body)


def logs_opening(sink: Sink, *, only_unsent: bool) -> Opening:
    """Return the log's stream. A clone leaves out the output of the base, which is on the host already."""
    fields: Body = [(FieldTag.FLAGS, _ONLY_UNSENT)] if only_unsent else []
    return Opening(kind=StreamKind.LOGS, what="logs", fields=fields, sink=sink)


def tar_in_opening(path: str, user: str, *, at_place: bool, hides: bool) -> Opening:
    """Return the stream that unpacks a tar in the guest, as in `Agent.tar_in`."""
    body: Body = [(FieldTag.PATH, path)]
    if at_place or hides:
        body.append((FieldTag.FLAGS, _AT_PLACE | (_HIDES if hides else 0)))
    if user:
        body.append((FieldTag.USER, user))
    return Opening(kind=StreamKind.TAR_IN, what=f"copy to {path}", fields=body)
