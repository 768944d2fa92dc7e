"""Find a kernel for the guests: named, installed as a wheel, unpacked before, a distribution's package, the host's."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pytest_fcvm.errors import FcvmError, HostError, UsageProblem
from pytest_fcvm.host.process import resolve_tool, run_tool
from pytest_fcvm.kernel.modules import resolve_modules
from pytest_fcvm.kernel.vmlinux import read_release

__all__ = ["GuestKernel", "resolve_kernel"]

_WHEEL = "pytest_fcvm_kernel_x86_64"
# Debian's and Ubuntu's names for a kernel that is meant for virtual machines; the first that exists is taken.
_PACKAGES = ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-kvm", "linux-image-amd64")
_CURRENT = "current"
_APT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class GuestKernel:
    """A bzImage and its modules; `modules_dir` is None when all is built in. `digest` is the bzImage's SHA-256."""

    bzimage: Path
    modules_dir: Path | None
    release: str
    origin: str
    digest: str


def resolve_kernel(*, option: Path | None, kernels_dir: Path, progress: Callable[[str], None]) -> GuestKernel:
    """Return the kernel to use; one that has to be downloaded is kept in `kernels_dir`. Works without root.

    Raise UsageProblem for a wrong `option`, HostError that lists why no source has a kernel.
    """
    if option is not None:
        return _named(option, "given by --fcvm-kernel")
    reasons = []
    for source in (_wheel, _unpacked, _package, _host):
        try:
            kernel = source(kernels_dir, progress)
        except FcvmError as error:
            reasons.append(error.message)
        else:
            if kernel:
                return kernel
    raise HostError(
        "no guest kernel: " + "; ".join(reasons), hint="run apt-get update as root once, or name one with --fcvm-kernel"
    )


def _wheel(_kernels_dir: Path, _progress: Callable[[str], None]) -> GuestKernel | None:
    found = importlib.util.find_spec(_WHEEL)
    places = list(found.submodule_search_locations or ()) if found else []
    return _named(Path(places[0]) / "bzImage", f"package {_WHEEL}") if places else None


def _unpacked(kernels_dir: Path, _progress: Callable[[str], None]) -> GuestKernel | None:
    current = kernels_dir / _CURRENT
    if not current.is_symlink():
        return None
    folder = current.resolve()
    images = list((folder / "boot").glob("vmlinuz-*"))
    return _named(images[0], f"package {folder.name}") if images else None


def _package(kernels_dir: Path, progress: Callable[[str], None]) -> GuestKernel | None:
    resolve_tool("apt-get", package="apt")
    resolve_tool("dpkg-deb", package="dpkg")
    packages = _choose_packages()
    progress(f"downloading the guest kernel {packages[0]}")
    with tempfile.TemporaryDirectory(dir=kernels_dir, prefix="download.tmp-") as scratch:
        folder = Path(scratch)
        run_tool(["apt-get", "download", *packages], timeout_s=_APT_S, cwd=folder)
        unpacked = folder / "unpacked"
        unpacked.mkdir()
        for archive in sorted(folder.glob("*.deb")):
            _unpack(archive, unpacked)
        release = read_release(next((unpacked / "boot").glob("vmlinuz-*")))
        _keep_needed_modules(unpacked / "lib" / "modules" / release)
        final = kernels_dir / release
        shutil.rmtree(final, ignore_errors=True)
        unpacked.rename(final)
    link = kernels_dir / f"{_CURRENT}.{os.getpid()}"
    with suppress(FileNotFoundError):
        link.unlink()
    link.symlink_to(final.name)
    link.replace(kernels_dir / _CURRENT)
    return _unpacked(kernels_dir, progress)


def _choose_packages() -> list[str]:
    """Return the packages with the image and the modules behind a distribution's meta package."""
    for meta in _PACKAGES:
        wanted = [name for name in _depends(meta) if name.startswith("linux-image-")]
        if wanted:
            modules = [name for name in _depends(wanted[0]) if name.startswith("linux-modules-")]
            return [wanted[0], *modules[:1]]
    raise HostError("apt knows no kernel for virtual machines", hint="run apt-get update as root")


def _depends(package: str) -> list[str]:
    with suppress(HostError):
        lines = run_tool(["apt-cache", "depends", "--important", package], timeout_s=_APT_S).splitlines()
        return [line.partition("Depends:")[2].strip() for line in lines if "Depends:" in line]
    return []


def _unpack(archive: Path, folder: Path) -> None:
    """Take boot/ and lib/modules/ out of a Debian package, without its scripts and without root."""
    data = folder.with_name(f"{archive.name}.tar")
    run_tool(["sh", "-c", 'dpkg-deb --fsys-tarfile "$1" > "$2"', "sh", archive, data], timeout_s=_APT_S)
    with tarfile.open(data) as content:
        for member in content:
            path = member.name.removeprefix("./").removeprefix("usr/")
            if member.isreg() and path.startswith(("boot/vmlinuz-", "lib/modules/")):
                member.name = path
                content.extract(member, folder, filter="data")
    data.unlink()


def _keep_needed_modules(tree: Path) -> None:
    needed = set(resolve_modules(tree))
    for path in list(tree.rglob("*")):
        if path.is_file() and path.name != "modules.builtin" and path not in needed:
            path.unlink()
    for folder in sorted((path for path in tree.rglob("*") if path.is_dir()), reverse=True):
        with suppress(OSError):  # not empty
            folder.rmdir()


def _host(_kernels_dir: Path, _progress: Callable[[str], None]) -> GuestKernel | None:
    image = Path("/boot") / f"vmlinuz-{os.uname().release}"
    if not os.access(image, os.R_OK):
        raise HostError(f"{image} is not readable")
    return _named(image, "the host's own kernel")


def _named(image: Path, origin: str) -> GuestKernel:
    release = read_release(image)
    places = (image.parent.parent / "lib/modules" / release, image.parent / "modules", Path("/lib/modules") / release)
    tree = next((place for place in places if place.is_dir()), None)
    if tree is None and _WHEEL not in str(image) and not (image.parent / "built-in").exists():
        raise UsageProblem(
            f"{image} ({release}) has no modules beside it",
            hint=f"put them in {places[0]}, or an empty file {image.parent / 'built-in'} if it needs none",
        )
    digest = hashlib.sha256(image.read_bytes()).hexdigest()
    return GuestKernel(bzimage=image, modules_dir=tree, release=release, origin=origin, digest=digest)
