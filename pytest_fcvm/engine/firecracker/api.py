"""Firecracker's API: one line for each call, over HTTP on a Unix socket.

The calls are those of the OpenAPI file in each release of Firecracker (src/firecracker/swagger).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pytest_fcvm.engine.firecracker.faults import explain_fault
from pytest_fcvm.engine.firecracker.version import FirecrackerVersion
from pytest_fcvm.errors import EngineError, UsageProblem

if TYPE_CHECKING:
    import ssl

    import httpx  # 0.1 s, and most hosts that ask for an engine have no Firecracker

__all__ = [
    "ACTIONS",
    "BALLOON",
    "BALLOON_HINTING_START",
    "BALLOON_HINTING_STATUS",
    "BALLOON_HINTING_STOP",
    "BALLOON_RESIZE",
    "BALLOON_STATISTICS",
    "BALLOON_STATISTICS_INTERVAL",
    "BOOT_SOURCE",
    "CALLS",
    "CPU_CONFIG",
    "DESCRIBE",
    "DRIVE",
    "DRIVE_UPDATE",
    "ENTROPY",
    "LOGGER",
    "MACHINE_CONFIG",
    "METRICS",
    "MMDS",
    "MMDS_CONFIG",
    "MMDS_UPDATE",
    "NETWORK_INTERFACE",
    "PMEM",
    "SERIAL",
    "SNAPSHOT_CREATE",
    "SNAPSHOT_LOAD",
    "VERSION",
    "VM",
    "VM_CONFIG",
    "VSOCK",
    "Api",
    "Call",
    "NoAnswer",
]

_BASE_URL = "http://localhost"
_TIMEOUT_S = 60.0  # one call


@dataclass(frozen=True)
class Call:
    """One call of the API. `path` may hold `{id}`. `since` is the first version that has the call.

    `fields_since` has the first version of each field that is newer than the oldest version that we use.
    """

    method: str
    path: str
    since: tuple[int, int, int] = (1, 14, 4)
    fields_since: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)

    def of(self, identifier: str) -> Call:
        """Return the call for one drive, interface or pmem device."""
        return replace(self, path=self.path.format(id=identifier))

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


DESCRIBE = Call("GET", "/")
VERSION = Call("GET", "/version")
VM_CONFIG = Call("GET", "/vm/config")
ACTIONS = Call("PUT", "/actions")
BALLOON = Call("PUT", "/balloon")
BALLOON_READ = Call("GET", "/balloon")
BALLOON_RESIZE = Call("PATCH", "/balloon")
BALLOON_STATISTICS = Call("GET", "/balloon/statistics")
BALLOON_STATISTICS_INTERVAL = Call("PATCH", "/balloon/statistics")
BALLOON_HINTING_START = Call("PATCH", "/balloon/hinting/start")
BALLOON_HINTING_STATUS = Call("GET", "/balloon/hinting/status")
BALLOON_HINTING_STOP = Call("PATCH", "/balloon/hinting/stop")
BOOT_SOURCE = Call("PUT", "/boot-source")
CPU_CONFIG = Call("PUT", "/cpu-config")
DRIVE = Call("PUT", "/drives/{id}")
DRIVE_UPDATE = Call("PATCH", "/drives/{id}")
ENTROPY = Call("PUT", "/entropy")
HOTPLUG_MEMORY = Call("PUT", "/hotplug/memory")
HOTPLUG_MEMORY_READ = Call("GET", "/hotplug/memory")
HOTPLUG_MEMORY_RESIZE = Call("PATCH", "/hotplug/memory")
LOGGER = Call("PUT", "/logger")
MACHINE_CONFIG = Call("PUT", "/machine-config")
MACHINE_CONFIG_READ = Call("GET", "/machine-config")
MACHINE_CONFIG_UPDATE = Call("PATCH", "/machine-config")
METRICS = Call("PUT", "/metrics")
MMDS = Call("PUT", "/mmds")
MMDS_READ = Call("GET", "/mmds")
MMDS_UPDATE = Call("PATCH", "/mmds")
MMDS_CONFIG = Call("PUT", "/mmds/config")
NETWORK_INTERFACE = Call("PUT", "/network-interfaces/{id}", fields_since={"mtu": (1, 16, 0)})
NETWORK_INTERFACE_UPDATE = Call("PATCH", "/network-interfaces/{id}")
PMEM = Call("PUT", "/pmem/{id}", fields_since={"rate_limiter": (1, 16, 0)})
PMEM_UPDATE = Call("PATCH", "/pmem/{id}", since=(1, 16, 0))
SERIAL = Call("PUT", "/serial", fields_since={"rate_limiter": (1, 16, 0)})
SNAPSHOT_CREATE = Call("PUT", "/snapshot/create")
SNAPSHOT_LOAD = Call("PUT", "/snapshot/load", fields_since={"vsock_override": (1, 16, 0)})
VM = Call("PATCH", "/vm")
VSOCK = Call("PUT", "/vsock")

CALLS: tuple[Call, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Call))
"""All calls."""


class NoAnswer(EngineError):
    """Firecracker did not answer a call: it has ended, or it hangs."""


class Api:
    """The API of one Firecracker process. Any thread may call any method; one call runs at a time.

    `transport` connects to the socket; tests pass another one.
    """

    def __init__(
        self, socket: Path, version: FirecrackerVersion, *, transport: httpx.BaseTransport | None = None
    ) -> None:
        import httpx

        self._version = version
        self._one_at_a_time = threading.Lock()  # `close` takes it too, so that every call gets its answer
        transport = transport or httpx.HTTPTransport(
            uds=str(socket), verify=_unused_tls(), limits=httpx.Limits(max_connections=1, keepalive_expiry=None)
        )
        self._client = httpx.Client(transport=transport, base_url=_BASE_URL, timeout=_TIMEOUT_S, trust_env=False)

    def send(self, call: Call, body: Mapping[str, Any] | None = None, *, timeout_s: float = _TIMEOUT_S) -> Any:
        """Make one call and return its answer, None where it has none. Wait for at most `timeout_s`.

        Raise UsageProblem for a call or field that this version lacks, NoAnswer, and the error of `explain_fault` for a
        refusal.
        """
        import httpx

        self._check(call, body)
        try:
            with self._one_at_a_time:
                if self._client.is_closed:
                    raise NoAnswer(f"Firecracker has ended before {call}")
                answer = self._client.request(call.method, call.path, json=body, timeout=timeout_s)
        except httpx.HTTPError as error:
            raise NoAnswer(f"Firecracker did not answer {call}: {str(error) or type(error).__name__}") from error
        if answer.is_error:
            raise explain_fault(str(call), answer.status_code, _fault_of(answer))
        return answer.json() if answer.content else None

    def close(self) -> None:
        """Close the connection, after a running call has its answer."""
        with self._one_at_a_time:
            self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, call: Call, body: Mapping[str, Any] | None) -> None:
        if self._version < call.since:
            raise _too_old(f"{call}", call.since, self._version)
        for name in body or ():
            since = call.fields_since.get(name)
            if since and self._version < since:
                raise _too_old(f"{name!r} of {call}", since, self._version)


@functools.cache
def _unused_tls() -> ssl.SSLContext:
    """Return one TLS context for all VMs. httpx would make one per VM: 20 ms with certificates, 1 ms without."""
    import httpx

    return httpx.create_ssl_context(verify=False)


def _too_old(what: str, since: tuple[int, int, int], version: FirecrackerVersion) -> UsageProblem:
    wanted = ".".join(map(str, since))
    return UsageProblem(f"Firecracker {version} has no {what}", hint=f"it came with {wanted}")


def _fault_of(answer: httpx.Response) -> str:
    with suppress(ValueError):
        body = answer.json()
        if isinstance(body, dict) and "fault_message" in body:
            return str(body["fault_message"])
    return answer.text
