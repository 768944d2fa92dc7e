"""`fcvm setup`: say what machines need here, then get it, without root as far as that goes."""

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

# A program that has to be there, and the package of Debian and Ubuntu that has it.
_NEEDED = {
    "qemu-system-x86_64": "qemu-system-x86",
    "skopeo": "skopeo",
    "mksquashfs": "squashfs-tools",
    "zstd": "zstd",
    "lz4": "lz4",
}
_KERNEL_WHEEL = "pytest-fcvm-kernel-x86-64"


def missing_packages() -> list[str]:
    """Return the packages whose programs are not there."""
    return [package for program, package in _NEEDED.items() if find_tool(program) is None]


def set_up(*, cache_dir: str | None, dry_run: bool, sudo: bool) -> int:
    """Say each step, then take it. Return 0 when a test could run now.

    Packages are installed as root, or with `sudo`; else the command is shown. Raise HostError for a step that failed.
    """
    packages = missing_packages()
    options = Options(cache_dir=Path(cache_dir).resolve() if cache_dir else None)
    _say(f"1. programs: {'all there' if not packages else 'missing ' + ', '.join(packages)}")
    _say("2. guest kernel: the installed one, else a distribution's, downloaded and unpacked without root")
    _say("3. engine: boot the kernel once, to see what works here")
    if dry_run:
        return 0
    if packages and not _install(packages, sudo=sudo):
        return 1
    with tempfile.TemporaryDirectory(prefix="fcvm-setup-") as shared:
        harness = Harness(options, shared_dir=Path(shared), announce=_say)
        try:
            _say(f"guest kernel: {harness.kernel.release} ({harness.kernel.origin})")
            if harness.kernel.modules_dir is not None:  # all of ours is built in
                _say(f"  clones are faster with the kernel made for them: pip install {_KERNEL_WHEEL}")
            _say(f"engine: {harness.choice}")
        finally:
            harness.close()
    _say("ready: pytest --fcvm-image IMAGE")
    return 0


def set_up_firecracker(cache_dir: str | None, version: str | None, base_url: str | None, *, dry_run: bool) -> int:
    """Get a release of Firecracker, where the engine finds it. Return 0. Raise HostError for one that cannot be had."""
    version, base_url = version or LATEST, base_url or BASE_URL
    root = cache_root(Path(cache_dir).resolve() if cache_dir else None)
    _say(f"Firecracker {version} of {base_url}, into {tools_dir(root)}")
    if not dry_run:
        program = install_release(version, root, _say, base_url)
        _say(f"ready: {program}; --fcvm-engine auto takes it where KVM works (fcvm doctor)")
    return 0


def _install(packages: Sequence[str], *, sudo: bool) -> bool:
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *packages]
    if os.geteuid() and not sudo:
        _say(f"  run this as root, then fcvm setup again: apt-get update && {' '.join(command)}")
        return False
    prefix = ["sudo"] if os.geteuid() else []
    if find_tool("apt-get") is None:
        raise HostError(f"no apt-get here to install {', '.join(packages)}", hint="install them by your own means")
    with suppress(FcvmError):
        _run([*prefix, "apt-get", "update", "--quiet"])  # an old list may do
    _run([*prefix, *command])
    return True


def _run(command: Sequence[str]) -> None:
    _say(f"  {' '.join(command)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    if subprocess.run(command, env=environment, stdout=sys.stderr, check=False).returncode:
        raise HostError(f"{' '.join(command[:3])} failed", hint="its own words are above")


def _say(text: str) -> None:
    sys.stderr.write(f"fcvm: {text}\n")
