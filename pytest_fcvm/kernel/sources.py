"""Find a guest kernel: a named one, an installed wheel, an unpacked one, a distribution's package, or the host's own.

A downloaded kernel is the entry `kernel` of the store's collection of kernels: vmlinuz, the modules that guests need
and the list of built-in modules, all in one directory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_fcvm.errors import FcvmError, HostError
from pytest_fcvm.host.own import environment, os, shutil
from pytest_fcvm.host.paths import package_dir
from pytest_fcvm.host.process import ToolFailed, killed_with_us, resolve_tool, run_tool
from pytest_fcvm.kernel.modules import resolve_modules
from pytest_fcvm.kernel.vmlinux import read_release
from pytest_fcvm.model.results import Progress
from pytest_fcvm.store import Collection, Entry

__all__ = ["MODULES_REVISION", "STOCK", "GuestKernel", "resolve_kernel"]


STOCK = "stock"
"""The value of `--fcvm-kernel` for a distribution's kernel."""

_KEY = "kernel"
MODULES_REVISION = 2  # increase it when guests get other modules of a kernel than before
_IMAGE = "vmlinuz"
_BUILT_IN = "modules.builtin"
_WHEEL = "pytest_fcvm_kernel_x86_64"
# Debian's and Ubuntu's packages of a kernel for virtual machines; take the first that apt knows.
_PACKAGES = ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-kvm", "linux-image-amd64")
_APT_S = 300.0
_UNPACK_S = 120.0
_HINT = "run apt-get update as root once, or name a kernel with --fcvm-kernel PATH"


@dataclass(frozen=True, kw_only=True)
class GuestKernel:
    """A kernel and its modules.

    `bzimage` is a bzImage or an ELF vmlinux. `modules_dir` has the layout of /lib/modules/RELEASE; it is None if all
    modules are built in. `origin` is a description for users. `digest` is a SHA-256 over the image and the modules that
    a guest gets.
    """

    bzimage: Path
    modules_dir: Path | None
    release: str
    origin: str
    digest: str


def resolve_kernel(
    *, option: Path | str | None, kernels_dir: Path, progress: Progress, root: Path = Path("/")
) -> GuestKernel:
    """Return the kernel to use. Keep a downloaded one in `kernels_dir`. Needs no root.

    `option` is a kernel's path, or `stock` for a distribution's kernel even if the wheel with a kernel is installed.
    The caller holds the lock of the key `kernel` in `kernels_dir`, a collection of the store. `root` replaces `/` in
    tests. Raise UsageProblem if `option` is not a kernel, HostError if the kernel lacks modules that guests need, or if
    no source has a kernel (the message has the reason of each source).
    """
    if isinstance(option, Path):
        return _describe_named(option, "--fcvm-kernel", root)
    collection = Collection(path=kernels_dir)
    sources: tuple[Callable[[], GuestKernel | None], ...] = (
        lambda: None if option == STOCK else _find_wheel(),
        lambda: _find_unpacked(collection, progress),
        lambda: _download(collection, progress),
        lambda: _find_unpacked(collection, progress, up_to_date=False),
        lambda: _resolve_host(root),
    )
    reasons = []
    for source in sources:
        try:
            kernel = source()
        except FcvmError as error:
            reasons.append(error.message)
        else:
            if kernel is not None:
                return kernel
    raise HostError(f"no guest kernel: {'; '.join(reasons)}", hint=_HINT)


def _find_wheel() -> GuestKernel | None:
    directory = package_dir(_WHEEL)
    return _describe(directory / "bzImage", None, f"package {_WHEEL}") if directory else None


def _find_unpacked(collection: Collection, progress: Progress, *, up_to_date: bool = True) -> GuestKernel | None:
    existed = (collection.path / _KEY).exists()
    entry = collection.find(_KEY)
    if existed and entry is None:
        progress("the unpacked guest kernel has changed; fetching it again")
    if entry is None or (
        up_to_date and entry.facts.get("modules") != MODULES_REVISION and not collection.is_in_use(_KEY)
    ):
        return None
    return _from_entry(entry)


def _from_entry(entry: Entry) -> GuestKernel:
    facts = {name: str(entry.facts[name]) for name in ("release", "origin", "digest")}
    return GuestKernel(bzimage=entry.file(_IMAGE), modules_dir=entry.path, **facts)


def _download(collection: Collection, progress: Progress) -> GuestKernel:
    for tool, package in (("apt-get", "apt"), ("apt-cache", "apt"), ("dpkg-deb", "dpkg")):
        resolve_tool(tool, package=package)
    packages = _choose_packages()
    progress(f"downloading the guest kernel {packages[0]}")
    try:
        return _from_entry(collection.build(_KEY, lambda directory: _fill(directory, packages)))
    except OSError as error:
        raise HostError(f"{error.filename or collection.path}: {error.strerror}") from error


def _fill(directory: Path, packages: list[str]) -> Mapping[str, Any]:
    """Unpack a kernel from packages into a directory. This needs neither root nor the scripts of the packages."""
    scratch = directory / "scratch"
    unpacked = scratch / "unpacked"
    scratch.mkdir()
    _run("apt-get", "download", *packages, timeout_s=_APT_S, cwd=scratch)
    archives = sorted(scratch.glob("*.deb"))
    for archive in archives:
        _run("dpkg-deb", "--extract", archive, unpacked, timeout_s=_UNPACK_S)
    image = _only_kernel(unpacked)
    release = read_release(image)
    tree = next((place for place in _module_places(unpacked, release) if place.is_dir()), None)
    if tree is None:
        raise HostError(f"{archives[0].name} has no modules for {release}")
    built_in = tree / _BUILT_IN
    for path in [*resolve_modules(tree), *([built_in] if built_in.exists() else [])]:
        path.rename(directory / path.name)
    image.rename(directory / _IMAGE)
    shutil.rmtree(scratch)
    origin = "package " + " ".join(next(path for path in archives if "-image-" in path.name).stem.split("_")[:2])
    kernel = _describe(directory / _IMAGE, directory, origin)
    return {"release": release, "origin": origin, "digest": kernel.digest, "modules": MODULES_REVISION}


def _run(tool: str, *arguments: str | Path, timeout_s: float, cwd: Path | None = None) -> None:
    prefix = killed_with_us()
    try:
        run_tool([*prefix, tool, *arguments], timeout_s=timeout_s, cwd=cwd)
    except ToolFailed as error:
        message = error.message.removeprefix(str(prefix[0]) if prefix else "").removeprefix(tool)
        raise HostError(f"{tool}{message}", evidence=error.evidence) from error


def _only_kernel(unpacked: Path) -> Path:
    images = [path for path in (unpacked / "boot").glob("vmlinuz-*") if path.is_file() and not path.is_symlink()]
    if len(images) != 1:
        raise HostError(f"the kernel's package has {len(images)} kernels")
    return images[0]


def _choose_packages() -> list[str]:
    """Return the packages with the image and the modules of a distribution's meta package, the image first."""
    for meta in _PACKAGES:
        image = next((name for name in _depends(meta) if name.startswith("linux-image-")), None)
        if image:
            # Debian has the modules in the package of the image, Ubuntu in another package.
            return [image, *(name for name in _depends(image) if name.startswith("linux-modules-"))]
    raise HostError("apt knows no kernel for virtual machines")


def _depends(package: str) -> list[str]:
    with suppress(HostError):  # apt does not know the package
        command = ["apt-cache", "depends", "--important", package]
        lines = run_tool(command, timeout_s=_APT_S, env={**environment(), "LC_ALL": "C"}).splitlines()
        return [line.partition("Depends:")[2].strip() for line in lines if "Depends:" in line]
    return []


def _resolve_host(root: Path) -> GuestKernel:
    release = os.uname().release
    places = (root / "boot" / f"vmlinuz-{release}", root / "lib/modules" / release / "vmlinuz")
    for place in places:
        if os.access(place, os.R_OK):
            return _describe_named(place, "the host's own", root)
    raise HostError(f"the host's own kernel {places[0]} {'is not readable' if places[0].exists() else 'is not there'}")


def _describe_named(image: Path, origin: str, root: Path) -> GuestKernel:
    release = read_release(image)
    directory = image.resolve().parent
    beside = (*_module_places(directory, release), directory / "modules", *_module_places(directory.parent, release))
    tree = next((place for place in (*beside, root / "lib/modules" / release) if place.is_dir()), None)
    return _describe(image.resolve(), tree, f"{origin} ({image})")


def _module_places(root: Path, release: str) -> tuple[Path, Path]:
    return root / "lib/modules" / release, root / "usr/lib/modules" / release


def _describe(image: Path, modules_dir: Path | None, origin: str) -> GuestKernel:
    release = read_release(image)
    digest = hashlib.sha256(image.read_bytes())
    for path in resolve_modules(modules_dir) if modules_dir else ():
        digest.update(f"{path.name}:".encode() + hashlib.sha256(path.read_bytes()).digest())
    return GuestKernel(
        bzimage=image, modules_dir=modules_dir, release=release, origin=origin, digest=digest.hexdigest()
    )
