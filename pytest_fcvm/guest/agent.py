"""Typed calls to the agent in the guest, over a session. Every method may be called from any thread."""

from __future__ import annotations

import errno
import shlex
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Self

from pytest_fcvm.errors import FcvmError, GuestError, GuestTimeout, WorkloadExited
from pytest_fcvm.guest.bodies import (
    Body,
    config_body,
    find_exit_status,
    identity_body,
    join_body,
    metric_values,
    process_body,
    workload_status,
)
from pytest_fcvm.guest.frames import EventKind, Fields, FieldTag, StreamKind, new_secret
from pytest_fcvm.guest.openings import logs_opening, open_session, personalise_opening, quiesce_opening, tar_in_opening
from pytest_fcvm.guest.process import GuestProcess
from pytest_fcvm.guest.served import ServedPort
from pytest_fcvm.guest.session import Explain, Opening, Session
from pytest_fcvm.guest.sockets import GuestDatagrams, GuestSocket
from pytest_fcvm.guest.streams import CallFailed, Sink, Stream
from pytest_fcvm.guest.transfer import LogStream, TarSink, TarSource
from pytest_fcvm.host.clock import Deadline
from pytest_fcvm.host.sockets import Socket
from pytest_fcvm.model.guest import (
    ExitStatus,
    GuestConfig,
    Identity,
    ListenState,
    ProcessSpec,
    WorkloadState,
    WorkloadStatus,
)
from pytest_fcvm.model.net import Attachment, Proto

__all__ = ["DEFAULT_TIMEOUT_S", "Agent", "start_session"]

DEFAULT_TIMEOUT_S = 30.0
_FINAL_OUTPUT_S = 2.0
ClockSource = Callable[[], int]  # in ns since 1970

_DETACHED, _ON_TERMINAL, _IS_INIT = 1, 2, 4
_NAME_LENGTH = 60  # of a command in messages


class Agent:
    """The agent at the other end of a session. Make the agent before the session starts, or events may be missed.

    Every call raises GuestTimeout at its deadline (`timeout_s`), CallFailed when the guest could not do it, and the
    reason of the session's end as soon as the session has ended.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.oom_kills = 0
        self._workload_exit: ExitStatus | None = None
        self._exit_callbacks: list[Callable[[ExitStatus], None]] = []
        self._log: Stream | None = None
        session.on_event = self._take_event

    # Verbs

    def configure(self, config: GuestConfig, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Mount the root file system, set up names and network. Call it once per boot, before `start`."""
        self._call(StreamKind.CONFIGURE, config_body(config), timeout_s)

    def start(self, spec: ProcessSpec, *, is_init: bool = False, timeout_s: float = DEFAULT_TIMEOUT_S) -> int:
        """Start the workload, once per boot, and return its process id. An init finds /run and /tmp empty."""
        body = process_body(spec)
        if is_init:
            body.append((FieldTag.FLAGS, _IS_INIT))
        return self._call(StreamKind.START, body, timeout_s).number(FieldTag.PID)

    def status(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> WorkloadStatus:
        """Return the state of the workload. An exit that is seen here is also passed to `on_workload_exit`."""
        status = workload_status(self._call(StreamKind.STATUS, [], timeout_s))
        if status.state is WorkloadState.EXITED and status.exit is not None:
            self._note_exit(status.exit)
        return status

    def metrics(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> dict[str, float | int | str]:
        """Return the metrics of the guest. The units are in the names."""
        return metric_values(self._call(StreamKind.METRICS, [], timeout_s))

    def quiesce(self, next_secret: bytes, *, keeps_peer: bool = False, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Freeze the workload and end this session; the agent then waits for `next_secret`.

        With `keeps_peer` the guest keeps the gateway's address, for clones that have no other peer either. Afterwards
        nothing reads or writes the channel, so that the VM can be saved. Call `close` after the VM has ended.
        """
        self._end_input(quiesce_opening(next_secret, keeps_peer=keeps_peer), next_secret, None, timeout_s)

    def suspend(self, copy_secret: bytes, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Freeze the workload and suspend the session, so that the VM can be copied; calls wait for `resume_session`.

        The agent in a copy waits for `copy_secret`.
        """
        resume_token = new_secret()
        body: Body = [(FieldTag.SECRET, copy_secret), (FieldTag.RESUME_TOKEN, resume_token)]
        opening = Opening(kind=StreamKind.SUSPEND, what="suspend", fields=body)
        self._end_input(opening, copy_secret, resume_token, timeout_s)

    def resume_session(
        self, channel: socket.socket, clock_ns: ClockSource | None, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        """Resume the session over the channel that the VM has now, set the guest's clock and thaw the workload."""
        deadline, holds = Deadline(timeout_s), clock_ns is not None  # hold waiting calls until the thaw
        stream = self.session.resume_session(channel, personalise_opening(Identity(stays_frozen=holds)), holds=holds)
        try:
            stream.wait_reply(deadline)
        finally:
            if clock_ns:
                stream = self.session.open_held(personalise_opening(Identity(realtime_ns=clock_ns())))
        if clock_ns:
            stream.wait_reply(deadline)

    def resume(
        self, resume: Callable[[], object], clock_ns: ClockSource | None, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        """Call `resume`, which resumes the VM, then set the guest's clock and thaw the workload."""
        # Send the request before the VM runs, so that the guest answers at once.
        stream = self.session.open(personalise_opening(Identity(stays_frozen=clock_ns is not None)))
        resume()
        deadline = Deadline(timeout_s)
        stream.wait_reply(deadline)
        if clock_ns:
            self.session.open(personalise_opening(Identity(realtime_ns=clock_ns()))).wait_reply(deadline)

    def freeze(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Freeze the workload until `personalise`. The session goes on."""
        self._call(StreamKind.FREEZE, [], timeout_s)

    def personalise(self, identity: Identity, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Give the guest its own random bytes, time, names and addresses, then thaw the workload."""
        self._call(StreamKind.PERSONALISE, identity_body(identity), timeout_s)

    def rename_hosts(self, lines: Sequence[str], *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Replace the lines of /etc/hosts, except for the guest's own name."""
        self._call(StreamKind.JOIN, join_body(lines), timeout_s)

    def listening(self, port: int, proto: Proto = Proto.TCP, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> ListenState:
        """Say whether something in the guest listens on a port, and whether it can be reached from outside."""
        body: Body = [(FieldTag.PORT, port), (FieldTag.PROTO, proto.value)]
        number = self._call(StreamKind.LISTENING, body, timeout_s, f"listening on {proto}/{port}")
        value = number.number(FieldTag.LISTENING)
        return ListenState(value) if value in set(ListenState) else ListenState.CLOSED

    def stop(self, signal: int, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Send a signal to the workload's first process."""
        self._call(StreamKind.STOP, [(FieldTag.SIGNAL, signal)], timeout_s)

    def sync(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Write the guest's dirty pages to its disks."""
        self._call(StreamKind.SYNC, [], timeout_s)

    def poweroff(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Turn the VM off. The channel may end before the reply, which is no error."""
        try:
            self._call(StreamKind.POWEROFF, [], timeout_s)
        except GuestError:
            if self.session.reason is None:
                raise

    # Streams

    def exec(
        self,
        spec: ProcessSpec,
        *,
        detached: bool = False,
        terminal: tuple[int, int] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> GuestProcess:
        """Start a program beside the workload. `terminal` gives it a terminal of (rows, columns).

        A `detached` program goes on without its stream and session; of output that is not read, the last 64 KiB are
        kept. The timeout is for the start.
        """
        body = process_body(spec)
        flags = (_DETACHED if detached else 0) | (_ON_TERMINAL if terminal else 0)
        if flags:
            body.append((FieldTag.FLAGS, flags))
        if terminal:
            body += ((FieldTag.ROWS, terminal[0]), (FieldTag.COLUMNS, terminal[1]))
        stream = self._open(StreamKind.EXEC, body, f"exec {shlex.join(spec.argv)[:_NAME_LENGTH]}")
        if detached:
            stream.keep_last()
        return GuestProcess(stream, stream.wait_reply(Deadline(timeout_s)).number(FieldTag.PID))

    def attach(self, pid: int, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> GuestProcess:
        """Return a command that goes on, or has ended, without the session that started it. Works once per command.

        Its stdin is at the end. The last 64 KiB of each output since then can be read.
        """
        stream = self._open(StreamKind.ATTACH, [(FieldTag.PID, pid)], f"attach to process {pid}")
        reply = stream.wait_reply(Deadline(timeout_s))
        return GuestProcess(stream, pid, lost_bytes=int(metric_values(reply).get("dropped_bytes", 0)))

    def connect(self, port: int, timeout_s: float = DEFAULT_TIMEOUT_S, *, address: str = "") -> GuestSocket:
        """Connect to a TCP port in the guest, at the address of its interface unless `address` is given.

        Raise the error of connect in the guest as OSError, for example ConnectionRefusedError.
        """
        return GuestSocket(self._dial(port, Proto.TCP, address, timeout_s))

    def serve(self, listener: Socket, port: int, report_fault: Callable[[str, str], object]) -> ServedPort:
        """Connect the clients of a host listener to a TCP port in the guest, until `close` or the session's end.

        The result owns the listener. `report_fault(what, why)` is called for a connection that fails ("was reset").
        """
        return ServedPort(self.session, listener, port, report_fault)

    def connect_datagrams(self, port: int, timeout_s: float = DEFAULT_TIMEOUT_S) -> GuestDatagrams:
        """Open a stream of datagrams to and from a UDP port in the guest. Raise OSError as `connect` does."""
        return GuestDatagrams(self._dial(port, Proto.UDP, "", timeout_s))

    def accept(self, port: int, address: str, *, timeout_s: float | None = None) -> GuestSocket:
        """Wait for the next TCP connection that a program in the guest makes to one of the guest's addresses.

        Raise OSError when the guest cannot listen there, or why the session ended.
        """
        body: Body = [(FieldTag.PORT, port), (FieldTag.ADDRESS, address)]
        return GuestSocket(self._open_socket(StreamKind.ACCEPT, body, f"accept on port {port}", Deadline(timeout_s)))

    def logs(self, sink: Sink, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> LogStream:
        """Follow the workload's output, beginning with what the agent's ring holds.

        `sink` is called on the session's thread. It must be quick and must not call the agent.
        """
        stream = self.session.open(logs_opening(sink, only_unsent=False))
        stream.wait_reply(Deadline(timeout_s))
        return LogStream(stream)

    def tar_in(
        self,
        path: str,
        *,
        user: str = "",
        at_place: bool = False,
        hides: bool = False,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
    ) -> TarSink:
        """Unpack a tar stream below the guest's directory `path`. The timeout is for the whole transfer.

        With `at_place`, the one root goes to `path`: a file into an existing directory, a directory merges with it.
        With `hides` the existing directory is emptied first.
        """
        stream = self.session.open(tar_in_opening(path, user, at_place=at_place, hides=hides))
        stream.wait_reply(Deadline(timeout_s))
        return TarSink(stream, timeout_s)

    def tar_out(self, path: str, *, timeout_s: float | None = DEFAULT_TIMEOUT_S) -> TarSource:
        """Fetch a file or directory of the guest as a tar stream. The timeout is for the whole transfer."""
        stream = self._open(StreamKind.TAR_OUT, [(FieldTag.PATH, path)], f"copy of {path}")
        stream.wait_reply(Deadline(timeout_s))
        return TarSource(stream, timeout_s)

    # The workload's end

    @property
    def workload_exit(self) -> ExitStatus | None:
        """Return how the workload ended, None while no end is known."""
        return self._workload_exit

    def on_workload_exit(self, callback: Callable[[ExitStatus], None]) -> None:
        """Call back once when the workload has ended, on any thread; at once if it has ended already."""
        with self.session.lock:
            status = self._workload_exit
            if status is None:
                self._exit_callbacks.append(callback)
        if status is not None:
            callback(status)

    def wait_until_workload_exit(self, timeout_s: float | None) -> ExitStatus:
        """Wait for the workload's end and return how it ended."""
        self.session.wait_until(
            lambda: self._workload_exit is not None, Deadline(timeout_s), "the workload did not end"
        )
        assert self._workload_exit is not None
        return self._workload_exit

    def wait_for_final_output(self) -> None:
        """Wait until the log has all output of an ended workload, whose end is reported before its final output."""
        if self._log is not None and self._workload_exit is not None:
            with suppress(FcvmError):
                self._log.wait_end(Deadline(_FINAL_OUTPUT_S))

    def check_workload(self) -> None:
        """Raise WorkloadExited if the workload is known to have ended."""
        if self._workload_exit is not None:
            raise WorkloadExited(
                f"the workload ended with {self._workload_exit}",
                hint="see the workload log for why; the image's command must stay in the foreground",
            )

    def close(self) -> None:
        """End the session."""
        self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _dial(self, port: int, proto: Proto, address: str, timeout_s: float) -> Stream:
        body: Body = [(FieldTag.PORT, port), (FieldTag.PROTO, proto.value)]
        if address:
            body.append((FieldTag.ADDRESS, address))
        return self._open_socket(StreamKind.CONNECT, body, f"connect to port {port}", Deadline(timeout_s))

    def _open_socket(self, kind: StreamKind, body: Body, what: str, deadline: Deadline) -> Stream:
        stream = self._open(kind, body, what)
        try:
            stream.wait_reply(deadline)
        except CallFailed as error:
            if error.errno == errno.EAGAIN:  # the agent's own limit of streams
                raise
            raise OSError(error.errno, error.message) from error
        return stream

    def _open(self, kind: StreamKind, body: Body, what: str) -> Stream:
        return self.session.open(Opening(kind=kind, what=what, fields=body))

    def _call(self, kind: StreamKind, body: Body, timeout_s: float, what: str = "") -> Fields:
        return self._open(kind, body, what or kind.name.lower()).wait_reply(Deadline(timeout_s))

    def _end_input(self, opening: Opening, secret: bytes, resume_token: bytes | None, timeout_s: float) -> None:
        try:
            stream = self.session.open_last(opening, secret, resume_token)
            stream.wait_reply(Deadline(timeout_s))
        except GuestTimeout as error:
            self.session.abort(error)  # it is unknown which secret the agent waits for
            raise
        except FcvmError:
            raise
        except BaseException:  # Ctrl-C, or the timeout of the test
            self.session.abort(GuestError(f"{opening.what} was interrupted", hint="ask for a new clone"))
            raise

    def _take_event(self, kind: EventKind, fields: Fields) -> None:
        self.oom_kills = max(self.oom_kills, fields.number(FieldTag.OOM_KILLS))
        status = find_exit_status(fields)
        if kind is EventKind.WORKLOAD_EXIT and status is not None:
            self._note_exit(status)

    def _note_exit(self, status: ExitStatus) -> None:
        with self.session.lock:
            if self._workload_exit is not None:
                return
            self._workload_exit = status
            callbacks, self._exit_callbacks = self._exit_callbacks, []
            self.session.changed.notify_all()
        for callback in callbacks:
            callback(status)


def start_session(
    sock: socket.socket,
    secret: bytes,
    *,
    identity: Identity | None = None,
    attachments: Sequence[Attachment] = (),
    log_sink: Sink | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    explain: Explain | None = None,
    clock_ns: ClockSource | None = None,
) -> Agent:
    """Start a session and return its agent after the first answer. With an `identity` the guest is personalised.

    Hello, private networks, identity and the log's stream go out in one write, which the guest reads only when it runs,
    up to a hundred milliseconds later on a busy host. With `clock_ns`, which returns ns since 1970, the workload stays
    frozen until the agent has answered and then got the time of day. The session owns the socket, and has closed it if
    this function raises.
    """
    try:
        agent = Agent(Session(sock, secret, explain=explain))
    except BaseException:
        sock.close()
        raise
    try:
        first = replace(identity, hook=(), stays_frozen=True) if identity and clock_ns else identity
        agent._log = open_session(agent.session, first, attachments, log_sink, Deadline(timeout_s))
        if identity and clock_ns:
            hook, env = identity.hook, identity.hook_env
            agent.personalise(Identity(realtime_ns=clock_ns(), hook=hook, hook_env=env), timeout_s=timeout_s)
    except BaseException:
        agent.close()
        raise
    return agent
