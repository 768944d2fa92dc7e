"""Features of the guest's kernel that programs use, in the project's own kernel and in a distribution's."""

from __future__ import annotations

import pytest

from pytest_fcvm import Clone

LINES = {
    "tun": "test -c /dev/net/tun",
    "FUSE": "test -c /dev/fuse",
    "loop devices": "test -c /dev/loop-control",
    "FAT and ISO 9660": "grep -qw vfat /proc/filesystems && grep -qw iso9660 /proc/filesystems",
    "iptables": "test -e /proc/net/ip_tables_names && test -e /proc/net/ip6_tables_names",
    "connection tracking": "test -e /proc/sys/net/netfilter/nf_conntrack_max",
    "calls of bridges to packet filters": "test -e /proc/sys/net/bridge/bridge-nf-call-iptables",
    "pressure": "test -r /proc/pressure/memory",
}


@pytest.mark.parametrize("feature", LINES)
def test_the_kernel_has_the_feature(fcvm_clone: Clone, feature: str) -> None:
    fcvm_clone.succeed(LINES[feature])
