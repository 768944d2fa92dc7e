"""How a guest is called and addressed, in a base and in its clones."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence

from pytest_fcvm.clone.commands import SHELL
from pytest_fcvm.host.own import os
from pytest_fcvm.model.guest import GuestConfig, Identity
from pytest_fcvm.model.specs import MachineSpec

__all__ = ["HOST_ADDRESS", "base_config", "fresh_identity", "hosts_of"]

HOST_ADDRESS = "127.77.0.1"  # in a guest that may reach ports of the host: its agent listens there

_ADDRESS, _GATEWAY, _DNS = "10.0.2.15", "10.0.2.2", "10.0.2.3"
_BASE_NAME = "fcvm-base"


def base_config(upper_mib: int, egress: bool, metadata: bool) -> GuestConfig:
    """Return a base's configuration. Without egress its NIC has no peer, and the gateway's address is its own.

    One with metadata has a route by which that is reached. `upper_mib` is the size of the writable layer in memory; 0
    puts it on the scratch disk.
    """
    return GuestConfig(
        hostname=_BASE_NAME,
        machine_id=uuid.UUID(bytes=os.urandom(16), version=4).hex,
        upper_mib=upper_mib or None,
        upper_device="" if upper_mib else "/dev/vdb",
        address=f"{_ADDRESS}/24",
        gateway=_GATEWAY,
        dns=(_DNS,) if egress else (),
        hosts=hosts_of(_BASE_NAME),
        peer_gateway=not (egress or metadata),
    )


def fresh_identity(
    name: str, spec: MachineSpec, env: Mapping[str, str], *, has_peer: bool, hosts: Iterable[str] = ()
) -> Identity:
    """Return what makes a clone unlike every other: random bytes from the host, names, MAC.

    `env` is for the hook. With `has_peer` its network has a gateway, whose address the guest then gives up. `hosts` are
    further lines.
    """
    random = os.urandom(70)
    return Identity(
        entropy=random[:32],
        hook=(*SHELL, spec.hook) if spec.hook else (),
        hook_env=env if spec.hook else {},
        hostname=name,
        machine_id=uuid.UUID(bytes=random[32:48], version=4).hex,
        boot_id=str(uuid.UUID(bytes=random[48:64], version=4)),
        interface="eth0",
        mac=":".join(f"{byte:02x}" for byte in (0x52, 0x54, 0x00, *random[64:67])),
        hosts=(*hosts_of(name, spec.host_ports), *hosts),
        peer_gateway=False if has_peer else None,
    )


def hosts_of(name: str, host_ports: Sequence[int] = ()) -> tuple[str, ...]:
    """Return the lines of /etc/hosts of a guest without private networks."""
    return (
        "127.0.0.1 localhost",
        "::1 localhost ip6-localhost ip6-loopback",
        f"{_ADDRESS} {name}",
        f"{HOST_ADDRESS if host_ports else _GATEWAY} host.fcvm",
    )
