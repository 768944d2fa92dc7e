"""How a guest is configured: what a base gets once, and the identity that each clone gets."""

from __future__ import annotations

import posixpath
import uuid
from collections.abc import Iterable, Mapping

from pytest_fcvm.clone.commands import SHELL
from pytest_fcvm.host.own import os
from pytest_fcvm.model.guest import GuestConfig, Identity
from pytest_fcvm.model.settings import ULIMITS
from pytest_fcvm.model.specs import VmSpec
from pytest_fcvm.network.addresses import DNS, GATEWAY, GUEST_ADDRESS, hosts_of
from pytest_fcvm.snapshot.inputs import SnapshotInputs

__all__ = ["base_config", "fresh_identity"]

_LEAST_UPPER_MIB = 32
_NO_VOLUMES = ("/", "/dev", "/etc", "/proc", "/sys")


def base_config(inputs: SnapshotInputs) -> GuestConfig:
    """Return a base's configuration.

    Without egress and metadata its NIC has no peer: the guest owns the gateway's address then.
    """
    spec, shape = inputs.spec, inputs.shape
    return GuestConfig(
        hostname=spec.hostname,
        machine_id=uuid.UUID(bytes=os.urandom(16), version=4).hex,
        upper_mib=None if shape.disk_mib else max(spec.mem_mib // 2, _LEAST_UPPER_MIB),
        upper_device="/dev/vdb" if shape.disk_mib else "",
        address=f"{GUEST_ADDRESS}/24",
        gateway=GATEWAY,
        dns=(DNS,) if shape.egress else (),
        hosts=hosts_of(""),
        peer_gateway=not (shape.egress or shape.metadata),
        volumes=_volumes(inputs.image.volumes),
        shm_mib=spec.shm_mib,
        ulimits={ULIMITS[name]: limit for name, limit in spec.ulimits.items()},
        sysctls=spec.sysctls,
    )


def _volumes(declared: Iterable[str]) -> tuple[str, ...]:
    """Return where an image's volumes are mounted, without the directories that the agent mounts or writes itself."""
    paths = sorted({posixpath.normpath(f"/{path}").replace("//", "/") for path in declared})
    return tuple(path for path in paths if f"/{path.split('/')[1]}" not in _NO_VOLUMES)


def fresh_identity(
    name: str, spec: VmSpec, env: Mapping[str, str], *, has_peer: bool, hosts: Iterable[str] = ()
) -> Identity:
    """Return a new identity for a clone: random bytes from the host, machine id, boot id, MAC, names.

    `env` is the hook's. `has_peer`: the clone's network has a gateway, so the guest gives that address up. `hosts` are
    further lines of /etc/hosts.
    """
    random = os.urandom(70)
    return Identity(
        entropy=random[:32],
        hook=(*SHELL, spec.hook) if spec.hook else (),
        hook_env=env if spec.hook else {},
        machine_id=uuid.UUID(bytes=random[32:48], version=4).hex,
        boot_id=str(uuid.UUID(bytes=random[48:64], version=4)),
        interface="eth0",
        mac=":".join(f"{byte:02x}" for byte in (0x52, 0x54, 0x00, *random[64:67])),
        hosts=(*hosts_of(name, spec.host_ports), *hosts),
        peer_gateway=False if has_peer else None,
    )
