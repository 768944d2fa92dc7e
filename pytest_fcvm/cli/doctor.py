"""`fcvm doctor`: try everything that a VM needs, and print the command that fixes what does not work."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from pytest_fcvm.errors import FcvmError
from pytest_fcvm.guest.binary import resolve_agent
from pytest_fcvm.harness import Harness
from pytest_fcvm.host.bundled import bundle_of
from pytest_fcvm.host.paths import cache_root, file_system_of, run_root
from pytest_fcvm.host.process import find_tool, run_tool
from pytest_fcvm.kernel.modules import find_lacking
from pytest_fcvm.model.parse import parse_network
from pytest_fcvm.options import Options

__all__ = ["Finding", "examine", "render"]

_ROOMY_BYTES = 2 << 30
_ONLY_OURS = (
    *("VXLAN", "WireGuard", "ipvlan", "ipset", "SCTP", "vcan", "XFS", "NFS", "CIFS", "device mapper"),
    "user attributes, O_DIRECT and O_TMPFILE in the layer in memory (before Linux 6.6)",
)
_OUR_KERNEL = "where a test needs that, install our own kernel: make kernel, or the wheel pytest-fcvm-kernel-x86-64"
_OUR_QEMU = "where many tests use one image, install our own QEMU: make qemu, or the wheel pytest-fcvm-qemu-x86-64"
_NETWORKS = ("rootless", "rootless,egress", "bridge,egress")  # the others need nothing of the host


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check. A VM runs only when all `needed` checks are ok. `remedy` is a command or an option."""

    what: str
    ok: bool
    detail: str
    remedy: str = ""
    needed: bool = True


def examine(cache_dir: str | None) -> list[Finding]:
    """Run all checks, also those after a failure. This boots a kernel and takes seconds."""
    options = Options(cache_dir=Path(cache_dir).resolve() if cache_dir else None)
    with tempfile.TemporaryDirectory(prefix="fcvm-doctor-") as shared:
        harness = Harness(options, shared_dir=Path(shared), announce=_talk)
        try:
            checks: list[tuple[str, Callable[[], str], bool]] = [
                ("host", _host, True),
                ("guest agent", lambda: str(resolve_agent()), True),
                ("skopeo (pulls images)", lambda: _tool("skopeo", "skopeo"), True),
                ("mksquashfs (packs images)", lambda: _tool("mksquashfs", "squashfs-tools"), True),
                ("zstd (zstd layers, Ubuntu's modules)", lambda: _tool("zstd", "zstd"), False),
                ("cache directory", lambda: _cache(options.cache_dir), True),
                ("run directory", lambda: str(run_root()), True),
                ("guest kernel", lambda: _kernel(harness), True),
                ("kernel for every program", lambda: _features(harness), False),
                ("lifetimes", lambda: harness.supervisor.isolation, True),
                ("engine", lambda: str(harness.choice), True),
                ("KVM", lambda: _kvm(harness), False),
                ("rewinding", lambda: _rewinding(harness), False),
                *((f"network {text}", partial(_network, harness, text), False) for text in _NETWORKS),
            ]
            return [_try(what, check, needed) for what, check, needed in checks]
        finally:
            harness.close()


def render(findings: list[Finding], *, as_json: bool, colour: bool) -> str:
    """Return the findings as text for people, or as JSON."""
    if as_json:
        return json.dumps([asdict(finding) for finding in findings], indent=1) + "\n"
    lines = []
    for finding in findings:
        word, code = ("ok", 32) if finding.ok else ("FAIL", 31) if finding.needed else ("no", 33)
        shown = f"\033[{code}m{word:>4}\033[0m" if colour else f"{word:>4}"
        lines.append(f"{shown}  {finding.what}: {finding.detail}")
        if finding.remedy and not finding.ok:
            lines.append(f"      → {finding.remedy}")
    broken = sum(not finding.ok for finding in findings if finding.needed)
    lines.append("everything that is needed works" if not broken else f"{broken} of the needed checks failed")
    return "\n".join(lines) + "\n"


def _try(what: str, check: Callable[[], str], needed: bool) -> Finding:
    try:
        return Finding(what=what, ok=True, detail=check(), needed=needed)
    except FcvmError as error:
        return Finding(what=what, ok=False, detail=error.message, remedy=error.hint, needed=needed)


def _talk(text: str) -> None:
    sys.stderr.write(f"fcvm: {text}\n")


def _host() -> str:
    system, architecture = platform.system(), platform.machine()
    if (system, architecture) != ("Linux", "x86_64"):
        raise FcvmError(f"{system} on {architecture}", hint='VMs need Linux on x86_64: use -m "not fcvm"')
    memory_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    return f"Linux {platform.release()} on {architecture}, {os.cpu_count()} CPUs, {memory_mib} MiB"


def _tool(name: str, package: str) -> str:
    path = find_tool(name)
    if path is None:
        raise FcvmError("not installed", hint=f"apt-get install {package}")
    first = run_tool([path, "-version" if name == "mksquashfs" else "--version"], timeout_s=20).splitlines()[:1]
    return f"{first[0] if first else name} ({bundle_of(path) or path})"


def _cache(option: Path | None) -> str:
    root = cache_root(option)
    free = shutil.disk_usage(root).free
    if free < _ROOMY_BYTES:
        raise FcvmError(f"{root} has only {free >> 20} MiB left", hint="free some disk, or use --fcvm-cache-dir")
    return f"{root} ({file_system_of(root) or 'unknown file system'}, {free >> 30} GiB free)"


def _kernel(harness: Harness) -> str:
    kernel = harness.provision.kernel
    return f"{kernel.release} ({kernel.origin})"


def _features(harness: Harness) -> str:
    """Report what a distribution's kernel lacks for programs in a guest."""
    modules = harness.provision.kernel.modules_dir
    if modules is None:
        return "everything is built in"
    lacking = [*find_lacking(modules), *_ONLY_OURS]
    raise FcvmError(f"{harness.provision.kernel.release} lacks {', '.join(lacking)}", hint=_OUR_KERNEL)


def _kvm(harness: Harness) -> str:
    report = harness.choice.report
    if report.accelerator != "kvm":
        raise FcvmError(report.reason or "not tried", hint=report.hint or "VMs are emulated; nothing has to be done")
    return "boots the guest kernel"


def _rewinding(harness: Harness) -> str:
    if not harness.choice.report.rewinds:
        raise FcvmError("each clone takes a new VMM process", hint=_OUR_QEMU)
    return f"by our own QEMU {harness.choice.report.version}, which gets security fixes with its wheel"


def _network(harness: Harness, text: str) -> str:
    """Make a namespace as a VM of Firecracker gets it, with all NICs."""
    harness.open_namespace(True, parse_network(text)).close()  # noqa: FBT003
    return "a namespace was made" + (", with egress" if "egress" in text else "")
