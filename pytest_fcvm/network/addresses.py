"""The address table: every address that guests and their networks have. Other modules take theirs from here."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "BRIDGE_HOST",
    "BRIDGE_NET",
    "DNS",
    "GATEWAY",
    "GUEST_ADDRESS",
    "HOST_ADDRESS",
    "METADATA_ADDRESS",
    "NICS",
    "SLIRP_NET",
    "SLIRP_RESOLVER",
    "hosts_of",
    "private_address",
    "private_address6",
    "private_mac",
]

# The helper programs import this module when they start: it imports nothing.

NICS = ("eth0", "eth1", "eth2")  # of every guest

# On a guest's first NIC, of a base and of a clone: the addresses of QEMU's own network
GUEST_ADDRESS, GATEWAY, DNS = "10.0.2.15", "10.0.2.2", "10.0.2.3"
HOST_ADDRESS = "127.77.0.1"  # in a guest that may reach ports of the host: the agent listens there
METADATA_ADDRESS = "169.254.169.254"  # as in clouds

# Between a network namespace and the host, for egress
SLIRP_NET, SLIRP_RESOLVER = "10.210.0.0/24", "10.210.0.3"
BRIDGE_HOST, BRIDGE_NET = "169.254.211.1", "10.211"  # the host's end of every veth pair; the prefix of the other ends


def hosts_of(name: str, host_ports: Sequence[int] = ()) -> tuple[str, ...]:
    """Return the lines of /etc/hosts in a guest without private networks, besides localhost and its host name.

    `name` is the clone's, empty for a base.
    """
    own = (f"{GUEST_ADDRESS} {name}",) if name else ()
    return (*own, f"{HOST_ADDRESS if host_ports else GATEWAY} host.fcvm")


def private_address(network: int, index: int) -> str:
    """Return the IPv4 address of a member of a private network."""
    return f"10.77.{network % 256}.{index}"


def private_address6(network: int, index: int) -> str:
    """Return the IPv6 address of a member of a private network."""
    return f"fd77:0:0:{network % 65536:x}::{index:x}"


def private_mac(network: int, index: int) -> str:
    """Return the MAC address of a member of a private network."""
    return f"02:fc:{network >> 8 & 255:02x}:{network & 255:02x}:00:{index:02x}"
