"""What namespaces of VMs may reach: rules of nftables, and the pairs of cards that lead to the host's networks.

Part of the program in `router.py`. Rules go through libnftables (libnftables(3)), which comes with `nft`.
"""

from __future__ import annotations

import ctypes
import os
import secrets
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyroute2 import IPRoute

__all__ = ["UPLINK", "Bridge", "Firewall", "rules_inside"]

UPLINK = "up0"
_LIBRARY = "libnftables.so.1"
_HOST = "169.254.211.1"  # the host's end of every pair
_NET = "10.211"  # the other ends, by the number of the host's card


class Firewall:
    """The rules of the namespace that this thread is in now. Tables with an owner last as long as this object."""

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
        """Add rules, as nft(8) takes them. Raise OSError with its words."""
        if self._library.nft_run_cmd_from_buffer(self._context, rules.encode()):
            said = self._library.nft_ctx_get_error_buffer(self._context).decode("utf-8", "replace").strip()
            raise OSError(1, said.splitlines()[0] if said else "refused", "nftables")

    def close(self) -> None:
        """Give the library's memory back; no other method is called then."""
        self._library.nft_ctx_free(self._context)


def rules_inside(card: str, dns: str, resolver: str, allow: Sequence[str]) -> str:
    """Return the rules of a VM's namespace: where its names are resolved, and what its guest may connect to.

    `resolver` is where `dns` leads, `allow` are addresses and networks; without any, all are allowed.
    """
    allowed = f"ip daddr != {{ {', '.join(allow)} }}" if allow else "ct state invalid"
    to_resolver = f'iifname "{card}" ip daddr {dns} meta l4proto {{ tcp, udp }} th dport 53 dnat to {resolver}'
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
            iifname "{card}" ct status dnat accept
            iifname "{card}" ct state new {allowed} reject with icmp type admin-prohibited
        }}
    }}
    """


class Bridge:
    """The host's side of the namespaces that lead to its networks: a pair of cards for each, and rules of its own.

    There is no device that would be left behind: a pair goes with its namespace, the rules with this process.
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
                    ip saddr @clones ip daddr {_NET}.0.0/16 reject with icmp type admin-prohibited
                }}
                chain host {{
                    type filter hook input priority filter
                    ip saddr @clones ct state new reject with icmp type admin-prohibited
                }}
            }}
            """
        )

    def join(self, namespace: int, inside: AbstractContextManager[object]) -> None:
        """Lead a namespace, of which this is a descriptor, to the host's networks; `inside` is being in it.

        Raise OSError.
        """
        from pyroute2.netlink.exceptions import NetlinkError

        name = f"fcvm{secrets.token_hex(5)}"
        try:
            self._route.link("add", ifname=name, kind="veth", peer={"ifname": UPLINK, "net_ns_fd": namespace})
            index = self._route.link_lookup(ifname=name)[0]
            address = f"{_NET}.{index >> 8 & 255}.{index & 255}"
            self._route.addr("add", index=index, address=_HOST, prefixlen=32)
            self._route.link("set", index=index, state="up")
            self._route.route("add", dst=f"{address}/32", oif=index)
            self._firewall.load(f"add element ip {self._table} clones {{ {address} }}")
            with inside:
                _open_egress(address)
        except NetlinkError as error:
            raise OSError(error.code, os.strerror(error.code), "bridge") from None


def _open_egress(address: str) -> None:
    """Give the other end of a pair its address and the way out."""
    from pyroute2 import IPRoute

    with IPRoute() as route:
        index = route.link_lookup(ifname=UPLINK)[0]
        route.addr("add", index=index, address=address, prefixlen=32)
        route.link("set", index=index, state="up")
        route.route("add", dst=f"{_HOST}/32", oif=index, scope="link")
        route.route("add", dst="default", gateway=_HOST, oif=index)
