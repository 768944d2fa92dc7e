"""The addresses of a guest's network, in bases and in clones. Everything that needs one takes it from here."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["DNS", "GATEWAY", "GUEST_ADDRESS", "HOST_ADDRESS", "METADATA_ADDRESS", "hosts_of"]

GUEST_ADDRESS, GATEWAY, DNS = "10.0.2.15", "10.0.2.2", "10.0.2.3"  # slirp's own numbers
HOST_ADDRESS = "127.77.0.1"  # in a guest that may reach ports of the host: its agent listens there
METADATA_ADDRESS = "169.254.169.254"  # where clouds have it


def hosts_of(name: str, host_ports: Sequence[int] = ()) -> tuple[str, ...]:
    """Return the lines of /etc/hosts of a guest without private networks, beside those of localhost and its host name.

    `name` is the clone's, empty for a base.
    """
    own = (f"{GUEST_ADDRESS} {name}",) if name else ()
    return (*own, f"{HOST_ADDRESS if host_ports else GATEWAY} host.fcvm")
