"""Bodies of requests and replies: dataclasses to fields, and fields to dataclasses."""

from __future__ import annotations

from collections.abc import Sequence

from pytest_fcvm.errors import UsageProblem
from pytest_fcvm.guest.frames import Fields, FieldTag, FieldValue
from pytest_fcvm.model.guest import (
    ExitStatus,
    GuestConfig,
    Identity,
    ProcessSpec,
    WorkloadState,
    WorkloadStatus,
    memory_advice,
)
from pytest_fcvm.model.net import Attachment

_STAYS_FROZEN = 16

__all__ = [
    "Body",
    "config_body",
    "exit_status",
    "find_exit_status",
    "identity_body",
    "join_body",
    "metric_values",
    "process_body",
    "workload_status",
]

Body = list[tuple[FieldTag, FieldValue]]


def config_body(config: GuestConfig) -> Body:
    """Return the fields of CONFIGURE. Raise UsageProblem for an invalid MAC address."""
    body = _common_body(config)
    body.append((FieldTag.ROOT_DEVICE, config.root_device))
    if config.upper_mib is not None:
        body.append((FieldTag.UPPER_MIB, config.upper_mib))
    if config.upper_device:
        body.append((FieldTag.UPPER_DEVICE, config.upper_device))
    if config.hostname:
        body.append((FieldTag.HOSTNAME, config.hostname))
    if config.shm_mib:
        body.append((FieldTag.SHM_MIB, config.shm_mib))
    body += ((FieldTag.VOLUME, path) for path in config.volumes)
    body += ((FieldTag.ULIMIT, f"{number}:{soft}:{hard}") for number, (soft, hard) in config.ulimits.items())
    body += ((FieldTag.SYSCTL, f"{name}={value}") for name, value in config.sysctls.items())
    return body


def identity_body(identity: Identity) -> Body:
    """Return the fields of PERSONALISE. Raise UsageProblem for an invalid MAC address."""
    body: Body = []
    if identity.entropy:
        body.append((FieldTag.ENTROPY, identity.entropy))
    if identity.realtime_ns is not None:
        body.append((FieldTag.REALTIME_NS, identity.realtime_ns))
    if identity.boot_id:
        body.append((FieldTag.BOOT_ID, identity.boot_id))
    body += _common_body(identity)
    body += ((FieldTag.ARG, argument) for argument in identity.hook)
    body += ((FieldTag.ENV, f"{name}={value}") for name, value in identity.hook_env.items())
    if identity.stays_frozen:
        body.append((FieldTag.FLAGS, _STAYS_FROZEN))
    return body


def join_body(hosts: Sequence[str], attachment: Attachment | None = None, interface: str = "") -> Body:
    """Return the fields of JOIN: an interface of a private network, or the lines of /etc/hosts alone."""
    body: Body = []
    if attachment is not None:
        body += [
            (FieldTag.INTERFACE, interface),
            (FieldTag.MAC, _mac_bytes(attachment.mac)),
            *((FieldTag.ADDRESS, address) for address in attachment.addresses),
        ]
    body += ((FieldTag.HOSTS, line) for line in hosts)
    return body


def process_body(spec: ProcessSpec) -> Body:
    """Return the fields of START and EXEC. Raise UsageProblem for an empty argv."""
    if not spec.argv:
        raise UsageProblem(
            "a process needs a program: its argv is empty", hint="give the command as a list or a string"
        )
    body: Body = [(FieldTag.ARG, argument) for argument in spec.argv]
    body += ((FieldTag.ENV, f"{name}={value}") for name, value in spec.env.items())
    if spec.cwd:
        body.append((FieldTag.CWD, spec.cwd))
    if spec.user:
        body.append((FieldTag.USER, spec.user))
    return body


def find_exit_status(fields: Fields) -> ExitStatus | None:
    """Return how a program ended, None if the fields do not contain it."""
    code, signal = fields.find_number(FieldTag.EXIT_CODE), fields.find_number(FieldTag.EXIT_SIGNAL)
    if code is None and signal is None:
        return None
    return ExitStatus(
        code=code,
        signal=None if code is not None else signal,
        message=fields.line(FieldTag.MESSAGE),
        oom_kills=fields.number(FieldTag.OOM_KILLS),
    )


def exit_status(fields: Fields) -> ExitStatus:
    """Return how a program ended. Without a status in the fields, the start counts as failed."""
    return find_exit_status(fields) or ExitStatus(code=126, message=fields.line(FieldTag.MESSAGE) or "no exit status")


def workload_status(fields: Fields) -> WorkloadStatus:
    """Return the reply to STATUS."""
    state = fields.text(FieldTag.STATE)
    return WorkloadStatus(
        state=WorkloadState(state) if state in set(WorkloadState) else WorkloadState.IDLE,
        exit=find_exit_status(fields),
        oom_kills=fields.number(FieldTag.OOM_KILLS),
    )


def metric_values(fields: Fields) -> dict[str, float | int | str]:
    """Return the reply to METRICS by name. A value that is not a number stays text.

    `memory` is added once the guest's memory has run out: a sentence that says what to do.
    """
    pairs = (text.partition("=") for text in fields.texts(FieldTag.METRIC))
    values = {name: _number_or_text(value) for name, _, value in pairs}
    kills = values.get("workload_oom_kills")
    if isinstance(kills, int) and kills:
        values["memory"] = memory_advice(kills)
    return values


def _common_body(source: GuestConfig | Identity) -> Body:
    """Return the fields that CONFIGURE and PERSONALISE have in common, without empty ones."""
    texts = (
        (FieldTag.MACHINE_ID, source.machine_id),
        (FieldTag.INTERFACE, source.interface),
        (FieldTag.ADDRESS, source.address),
        (FieldTag.GATEWAY, source.gateway),
    )
    body: Body = [(tag, text) for tag, text in texts if text]
    if source.mac:
        body.append((FieldTag.MAC, _mac_bytes(source.mac)))
    body += ((FieldTag.DNS, server) for server in source.dns)
    body += ((FieldTag.HOSTS, line) for line in source.hosts)
    if source.peer_gateway is not None:
        body.append((FieldTag.PEER_GATEWAY, int(source.peer_gateway)))
    return body


def _mac_bytes(text: str) -> bytes:
    try:
        data = bytes.fromhex(text.replace(":", ""))
    except ValueError:
        data = b""
    if len(data) != 6:
        raise UsageProblem(f"{text!r} is not a MAC address", hint="write it as 52:54:00:12:34:56")
    return data


def _number_or_text(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
