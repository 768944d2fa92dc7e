"""What the namespaces of VMs may reach: nftables rules, and veth pairs to the host's networks.

Part of the netns server. It loads rules through libnftables (libnftables(3)), which comes with `nft`.
"""

from __future__ import annotations

import ctypes
import os
import secrets
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from pytest_fcvm.network.addresses import BRIDGE_HOST, BRIDGE_NET, DNS

if TYPE_CHECKING:
    from pyroute2 import IPRoute

__all__ = ["UPLINK", "Bridge", "Firewall", "rules_inside"]

UPLINK = "up0"
_LIBRARY = "libnftables.so.1"


class Firewall:
    """The rules of the namespace that this thread is in. Tables with an owner last as long as this object."""

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL(_LIBRARY)
        except OSError:
            raise FileNotFoundError(2, os.strerror(2), "nftables") from None
        library.nft_ctx_new.restype = ctypes.c_void_p
        library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        self._library, self._context = library, ctypes.c_void_p(library.nft_ctx_new(0))
        library.nft_ctx_buffer_error(self._context)

    def load(self, rules: str) -> None:
        """Add rules, as nft(8) takes them. Raise OSError with the library's message."""
        if self._library.nft_run_cmd_from_buffer(self._context, rules.encode()):
            text = self._library.nft_ctx_get_error_buffer(self._context).decode("utf-8", "replace").strip()
            raise OSError(1, text.splitlines()[0] if text else "refused", "nftables")

    def close(self) -> None:
        """Free the library's memory. Call no other method afterwards."""
        self._library.nft_ctx_free(self._context)


def rules_inside(nic: str, resolver: str, allow: Sequence[str]) -> str:
    """Return the rules of a VM's namespace: which resolver its guest asks, and where its guest may connect to.

    `nic` is the guest's, `resolver` answers for DNS ("" for none), `allow` are addresses and networks, all when empty.
    """
    allowed = f"ip daddr != {{ {', '.join(allow)} }}" if allow else "ct state invalid"
    to_resolver = f'iifname "{nic}" ip daddr {DNS} meta l4proto {{ tcp, udp }} th dport 53 dnat to {resolver}'
    return f"""
    table ip fcvm {{
        chain names {{
            type nat hook prerouting priority dstnat
            {to_resolver if resolver else ""}
        }}
        chain out {{
            type nat hook postrouting priority srcnat
            oifname "{UPLINK}" masquerade
        }}
        chain forward {{
            type filter hook forward priority filter
            iifname "{nic}" ct status dnat accept
            iifname "{nic}" ct state new {allowed} reject with icmp type admin-prohibited
        }}
    }}
    """


class Bridge:
    """The host's side of the namespaces that reach its networks: a veth pair for each, and rules.

    It leaves nothing behind: the kernel removes a veth pair with its namespace, and the rules with this process.
    """

    def __init__(self) -> None:
        from pyroute2 import IPRoute

        with open("/proc/sys/net/ipv4/ip_forward") as file:  # noqa: PTH123 - pathlib costs 8 ms of start-up
            if file.read().strip() != "1":
                raise OSError(1, "this host does not forward packets", "ip_forward")
        self._route: IPRoute = IPRoute()
        self._firewall = Firewall()
        self._table = f"fcvm_{secrets.token_hex(4)}"
        self._firewall.load(
            f"""
            table ip {self._table} {{
                flags owner
                set clones {{
                    type ipv4_addr
                }}
                chain out {{
                    type nat hook postrouting priority srcnat
                    ip saddr @clones masquerade
                }}
                chain apart {{
                    type filter hook forward priority filter
                    ip saddr @clones ip daddr {BRIDGE_NET}.0.0/16 reject with icmp type admin-prohibited
                }}
                chain host {{
                    type filter hook input priority filter
                    ip saddr @clones ct state new reject with icmp type admin-prohibited
                }}
            }}
            """
        )

    def join(self, namespace: int, inside: AbstractContextManager[object]) -> None:
        """Connect a namespace, given by its descriptor, to the host's networks. `inside` enters it. Raise OSError."""
        from pyroute2.netlink.exceptions import NetlinkError

        name = f"fcvm{secrets.token_hex(5)}"
        try:
            self._route.link("add", ifname=name, kind="veth", peer={"ifname": UPLINK, "net_ns_fd": namespace})
            index = self._route.link_lookup(ifname=name)[0]
            address = f"{BRIDGE_NET}.{index >> 8 & 255}.{index & 255}"
            self._route.addr("add", index=index, address=BRIDGE_HOST, prefixlen=32)
            self._route.link("set", index=index, state="up")
            self._route.route("add", dst=f"{address}/32", oif=index)
            self._firewall.load(f"add element ip {self._table} clones {{ {address} }}")
            with inside:
                _configure_uplink(address)
        except NetlinkError as error:
            raise OSError(error.code, os.strerror(error.code), "bridge") from None


def _configure_uplink(address: str) -> None:
    """Give the namespace's end of a veth pair its address, and route all other networks through it."""
    from pyroute2 import IPRoute

    with IPRoute() as route:
        index = route.link_lookup(ifname=UPLINK)[0]
        route.addr("add", index=index, address=address, prefixlen=32)
        route.link("set", index=index, state="up")
        route.route("add", dst=f"{BRIDGE_HOST}/32", oif=index, scope="link")
        route.route("add", dst="default", gateway=BRIDGE_HOST, oif=index)
