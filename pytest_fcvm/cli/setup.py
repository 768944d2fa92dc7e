"""`fcvm setup`: print what VMs need here, then install it, without root where that is possible."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pytest_fcvm.engine.firecracker.installation import tools_dir
from pytest_fcvm.engine.firecracker.release import BASE_URL, LATEST, install_release
from pytest_fcvm.errors import FcvmError, HostError
from pytest_fcvm.harness import Harness
from pytest_fcvm.host.paths import cache_root
from pytest_fcvm.host.process import find_tool
from pytest_fcvm.options import Options

__all__ = ["missing_packages", "set_up", "set_up_firecracker"]

# A program that is needed, and the package of Debian and Ubuntu that contains it.
_NEEDED = {
    "qemu-system-x86_64": "qemu-system-x86",
    "skopeo": "skopeo",
    "mksquashfs": "squashfs-tools",
    "zstd": "zstd",
    "lz4": "lz4",
}
_KERNEL_WHEEL = "pytest-fcvm-kernel-x86-64"


def missing_packages() -> list[str]:
    """Return the packages whose programs are missing."""
    return [package for program, package in _NEEDED.items() if find_tool(program) is None]


def set_up(*, cache_dir: str | None, dry_run: bool, sudo: bool) -> int:
    """Print each step, then take it. Return 0 when a test can run now.

    Packages are installed as root, or with `sudo`; else the command is printed. Raise HostError for a failed step.
    """
    packages = missing_packages()
    options = Options(cache_dir=Path(cache_dir).resolve() if cache_dir else None)
    _say(f"1. programs: {'all installed' if not packages else 'missing ' + ', '.join(packages)}")
    _say("2. guest kernel: the installed one, else a distribution's, downloaded and unpacked without root")
    _say("3. engine: boot the kernel once to find the engine that works here")
    if dry_run:
        return 0
    if packages and not _install(packages, sudo=sudo):
        return 1
    with tempfile.TemporaryDirectory(prefix="fcvm-setup-") as shared:
        harness = Harness(options, shared_dir=Path(shared), announce=_say)
        try:
            _say(f"guest kernel: {harness.provision.kernel.release} ({harness.provision.kernel.origin})")
            if harness.provision.kernel.modules_dir is not None:  # our own kernel has everything built in
                _say(f"  clones are faster with the kernel made for them: pip install {_KERNEL_WHEEL}")
            _say(f"engine: {harness.choice}")
        finally:
            harness.close()
    _say("ready: pytest --fcvm-image IMAGE")
    return 0


def set_up_firecracker(cache_dir: str | None, version: str | None, base_url: str | None, *, dry_run: bool) -> int:
    """Install a release of Firecracker where the engine finds it. Return 0. Raise HostError when it is unavailable."""
    version, base_url = version or LATEST, base_url or BASE_URL
    root = cache_root(Path(cache_dir).resolve() if cache_dir else None)
    _say(f"Firecracker {version} of {base_url}, into {tools_dir(root)}")
    if not dry_run:
        program = install_release(version, root, _say, base_url)
        _say(f"ready: {program}; --fcvm-engine auto uses it where KVM works (fcvm doctor)")
    return 0


def _install(packages: Sequence[str], *, sudo: bool) -> bool:
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *packages]
    if os.geteuid() and not sudo:
        _say(f"  run this as root, then fcvm setup again: apt-get update && {' '.join(command)}")
        return False
    prefix = ["sudo"] if os.geteuid() else []
    if find_tool("apt-get") is None:
        raise HostError(f"no apt-get here to install {', '.join(packages)}", hint="use this system's package manager")
    with suppress(FcvmError):
        _run([*prefix, "apt-get", "update", "--quiet"])  # an old list may suffice
    _run([*prefix, *command])
    return True


def _run(command: Sequence[str]) -> None:
    _say(f"  {' '.join(command)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    if subprocess.run(command, env=environment, stdout=sys.stderr, check=False).returncode:
        raise HostError(f"{' '.join(command[:3])} failed", hint="its output is above")


def _say(text: str) -> None:
    sys.stderr.write(f"fcvm: {text}\n")
