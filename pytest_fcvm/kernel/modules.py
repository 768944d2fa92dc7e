"""Kernel modules: the files that a guest needs, in load order.

An unpacked kernel package has no modules.dep (depmod writes it at installation), so dependencies come from the modules:
`depends=` in the .modinfo section has names separated by commas (MODULE_INFO, scripts/mod).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from pytest_fcvm.errors import FcvmError, HostError
from pytest_fcvm.kernel.decompress import unpack
from pytest_fcvm.kernel.vmlinux import read_vmlinux

__all__ = ["check_built_in", "find_lacking", "read_module", "resolve_modules"]

# Modules that every guest needs, and the bytes that show that a kernel has them built in.
_REQUIRED = {
    "virtio_mmio": b"virtio-mmio\0",
    "virtio_blk": b"virtio_blk\0",
    "virtio_console": b"virtio_console\0",
    "squashfs": b"squashfs\0",
    "overlay": b"overlay\0",
}
# Modules that a guest gets if the kernel has them. dummy has the address of a guest without a NIC, tcp_diag lets the
# agent reset connections after a restore, ext4 is for scratch disks.
_OPTIONAL = ("virtio_net", "virtio_rng", "vmw_vsock_virtio_transport", "dummy", "tcp_diag", "ext4", "virtio_balloon")
# Modules that programs in the guest use but cannot load: an image has no modules for this kernel. They take some MiB of
# memory. Only the kernel of guest_image/kernel has large or rare ones (XFS, NFS, WireGuard, VXLAN, ipset, device
# mapper).
_FEATURES = {
    "nftables": (
        *("nf_tables", "nft_chain_nat", "nft_nat", "nft_redir", "nft_masq", "nft_ct", "nft_reject_inet", "nft_limit"),
        *("nft_log", "nft_numgen", "nft_hash", "nft_fib_inet", "nft_compat"),
    ),
    "iptables": (
        *("ip_tables", "iptable_filter", "iptable_nat", "iptable_mangle", "iptable_raw", "ipt_REJECT"),
        *("ip6_tables", "ip6table_filter", "ip6table_nat", "ip6table_mangle", "ip6t_REJECT"),
        *(
            "xt_tcpudp",
            "xt_nat",
            "xt_REDIRECT",
            "xt_MASQUERADE",
            "xt_conntrack",
            "xt_state",
            "xt_addrtype",
            "xt_comment",
        ),
        *(
            "xt_multiport",
            "xt_limit",
            "xt_LOG",
            "xt_mark",
            "xt_statistic",
            "xt_owner",
            "xt_connmark",
            "xt_recent",
            "xt_hl",
        ),
    ),
    "bridges": ("bridge", "br_netfilter"),
    "virtual network devices": ("veth", "macvlan", "8021q", "tun"),
    "traffic control": ("sch_netem", "sch_tbf", "sch_ingress"),
    "FUSE": ("fuse",),
    "loop devices": ("loop",),
    "FAT and ISO 9660": ("vfat", "nls_cp437", "nls_ascii", "nls_iso8859_1", "isofs"),
}
_FEATURE_MODULES = tuple(name for names in _FEATURES.values() for name in names)
_FILE = re.compile(r"(?P<name>.+)\.ko(?:\.(?:xz|zst|gz))?")
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")
_ELF_MAGIC = b"\x7fELF"
_HINT = "name a kernel for virtual machines with --fcvm-kernel, with its modules in lib/modules/RELEASE beside it"


def resolve_modules(tree: Path) -> list[Path]:
    """Return the module files that a guest needs, dependencies first, without built-in modules.

    `tree` is a /lib/modules/RELEASE directory, or any directory with modules and modules.builtin. Raise HostError
    naming the modules that no guest can do without and that are neither there nor built in.
    """
    files = {_name_of(path.name): path for path in sorted(tree.rglob("*.ko*")) if _FILE.fullmatch(path.name)}
    built_in = _built_in(tree)
    missing = [name for name in _REQUIRED if name not in files and name not in built_in]
    if missing:
        raise _missing_error(f"the guest kernel in {tree}", missing)
    ordered: dict[str, Path] = {}
    for name in (*_REQUIRED, *_OPTIONAL, *_FEATURE_MODULES):
        _add(name, files, ordered)
    return list(ordered.values())


def find_lacking(tree: Path) -> list[str]:
    """Return the names of the features that a kernel with modules lacks, such as "nftables"."""
    present = {_name_of(path.name) for path in tree.rglob("*.ko*")} | _built_in(tree)
    return [feature for feature, names in _FEATURES.items() if _plain(names[0]) not in present]


def check_built_in(image: Path) -> None:
    """Raise HostError if a kernel without modules lacks a driver that every guest needs.

    Accept a kernel that cannot be decompressed here: QEMU can boot it.
    """
    try:
        kernel = read_vmlinux(image)
    except FcvmError:
        return
    missing = [name for name, mark in _REQUIRED.items() if mark not in kernel]
    if missing:
        raise _missing_error(f"{image} comes without modules and", missing)


def read_module(path: Path) -> bytes:
    """Return a module, decompressed. Raise HostError if it cannot be decompressed here."""
    data = path.read_bytes()
    return data if data.startswith(_ELF_MAGIC) else unpack(data, what=f"the module {path}")


def _add(name: str, files: dict[str, Path], ordered: dict[str, Path]) -> None:
    if name in ordered or name not in files:
        return
    match = _DEPENDS.search(b"\0" + read_module(files[name]))
    for needed in match[1].decode().split(",") if match else ():
        _add(_plain(needed), files, ordered)
    ordered[name] = files[name]


def _built_in(tree: Path) -> set[str]:
    listing = tree / "modules.builtin"
    return {_name_of(Path(line).name) for line in listing.read_text().split()} if listing.exists() else set()


def _name_of(file_name: str) -> str:
    match = _FILE.fullmatch(file_name)
    return _plain(match["name"] if match else file_name)


def _plain(name: str) -> str:
    return name.replace("-", "_")


def _missing_error(who: str, missing: Iterable[str]) -> HostError:
    return HostError(f"{who} has no {', '.join(missing)}", hint=_HINT)
