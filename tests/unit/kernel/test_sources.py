"""The sources of the guest kernel, with an apt that serves small packages."""

from __future__ import annotations

import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pytest_fcvm.errors import HostError, UsageProblem
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.kernel.sources import GuestKernel, resolve_kernel
from pytest_fcvm.store import Collection

RELEASE = "6.1.0-56-cloud-amd64"

Resolve = Callable[..., GuestKernel]
WHEEL = "pytest_fcvm_kernel_x86_64"


@pytest.fixture(autouse=True)
def no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the kernel's wheel if it is installed."""
    monkeypatch.setitem(sys.modules, WHEEL, None)


class Said(list[str]):
    """The lines of progress."""


@pytest.fixture
def said() -> Said:
    return Said()


@pytest.fixture
def kernels_dir(tmp_path: Path) -> Path:
    path = tmp_path / "kernels"
    path.mkdir()
    return path


@pytest.fixture
def resolve(tmp_path: Path, kernels_dir: Path, said: Said) -> Resolve:
    """Return resolve_kernel with a root directory of its own."""

    def call(option: Path | None = None) -> GuestKernel:
        return resolve_kernel(option=option, kernels_dir=kernels_dir, progress=said.append, root=tmp_path / "root")

    return call


@pytest.fixture
def no_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without any command."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


# -- named


@pytest.mark.parametrize(
    ("image", "tree"),
    [
        ("k/vmlinuz", f"k/lib/modules/{RELEASE}"),
        ("k/vmlinuz", f"k/usr/lib/modules/{RELEASE}"),
        ("k/vmlinuz", "k/modules"),
        (f"k/boot/vmlinuz-{RELEASE}", f"k/lib/modules/{RELEASE}"),
        ("k/vmlinuz", f"root/lib/modules/{RELEASE}"),
    ],
)
def test_a_named_kernel_finds_its_modules(
    image: str, tree: str, tmp_path: Path, bzimage: Any, modules_tree: Any, resolve: Resolve
) -> None:
    path, modules = bzimage(image, b""), modules_tree(tmp_path / tree)
    kernel = resolve(path)
    assert (kernel.bzimage, kernel.modules_dir, kernel.release) == (path, modules, RELEASE)
    assert kernel.origin == f"--fcvm-kernel ({path})"


def test_modules_are_searched_beside_the_target_of_a_link(
    tmp_path: Path, bzimage: Any, modules_tree: Any, resolve: Resolve
) -> None:
    tree = modules_tree(tmp_path / "k/modules")
    link = tmp_path / "link"
    link.symlink_to(bzimage("k/vmlinuz", b""))
    assert resolve(link).modules_dir == tree


def test_a_kernel_without_a_modules_directory_is_accepted(bzimage: Any, resolve: Resolve) -> None:
    assert resolve(bzimage("vmlinuz", b"", release="6.12.117")).modules_dir is None


def test_a_vmlinux_can_be_named(tmp_path: Path, vmlinux: Any, resolve: Resolve) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(vmlinux(release="6.12.117"))
    kernel = resolve(path)
    assert (kernel.bzimage, kernel.release) == (path, "6.12.117")


def test_a_named_file_that_is_not_a_kernel_is_refused(
    tmp_path: Path, debian: object, resolve: Resolve, kernels_dir: Path
) -> None:
    with pytest.raises(UsageProblem, match="No such file"):
        resolve(tmp_path / "missing")
    assert not list(kernels_dir.iterdir())


def test_a_named_kernel_without_a_required_module_is_refused(
    tmp_path: Path, bzimage: Any, modules_tree: Any, resolve: Resolve
) -> None:
    modules_tree(tmp_path / "k/modules", without=("squashfs",))
    with pytest.raises(HostError, match="has no squashfs"):
        resolve(bzimage("k/vmlinuz", b""))


def test_the_digest_covers_the_kernel_and_the_modules_that_a_guest_gets(
    tmp_path: Path, bzimage: Any, modules_tree: Any, resolve: Resolve
) -> None:
    tree = modules_tree(tmp_path / "k/modules")
    digests = [resolve(bzimage("k/vmlinuz", b"one")).digest]
    digests.append(resolve(bzimage("k/vmlinuz", b"two")).digest)
    for module in ("virtio_blk", "xfs"):
        path = next(tree.rglob(f"{module}.ko"))
        path.write_bytes(path.read_bytes() + b"changed")
        digests.append(resolve(tmp_path / "k/vmlinuz").digest)
    assert len(set(digests[:3])) == 3
    assert digests[3] == digests[2], "no guest gets xfs"


# -- a distribution's package


def test_debians_kernel_is_downloaded_and_only_what_guests_need_is_kept(
    debian: object, resolve: Resolve, kernels_dir: Path, said: Said
) -> None:
    kernel = resolve()
    assert (kernel.release, kernel.origin) == (RELEASE, f"package linux-image-{RELEASE} 6.1.192-2")
    assert said == [f"downloading the guest kernel linux-image-{RELEASE}"]
    assert [path.name for path in kernels_dir.iterdir()] == ["kernel"]
    kept = {path.name for path in (kernels_dir / "kernel").iterdir()}
    assert {"vmlinuz", "virtio_blk.ko", "virtio-rng.ko", "modules.builtin"} <= kept
    assert not {"xfs.ko", "scratch"} & kept


def test_ubuntus_modules_come_from_another_package(
    apt: Any, tmp_path: Path, bzimage: Any, modules_tree: Any, resolve: Resolve
) -> None:
    release = "6.8.0-31-generic"
    apt.add("linux-image-virtual", None, (f"  Depends: linux-image-{release}", "  Depends: linux-base"))
    bzimage(f"image/boot/vmlinuz-{release}", b"", release=release)
    modules_tree(tmp_path / "modules/usr/lib/modules" / release, built_in=("virtio_mmio", "virtio_ring", "virtio"))
    apt.add(f"linux-image-{release}", tmp_path / "image", ("  Depends: kmod", f"  Depends: linux-modules-{release}"))
    apt.add(f"linux-modules-{release}", tmp_path / "modules")
    kernel = resolve()
    assert kernel.origin == f"package linux-image-{release} 6.1.192-2"
    assert {path.name for path in kernel.bzimage.parent.glob("*.ko")} >= {"virtio_blk.ko", "squashfs.ko"}


def test_an_unpacked_kernel_is_used_without_apt(
    debian: object, resolve: Resolve, said: Said, request: pytest.FixtureRequest
) -> None:
    first = resolve()
    request.getfixturevalue("no_apt")
    assert resolve() == first
    assert len(said) == 1


def test_an_unpacked_kernel_with_fewer_modules_is_fetched_again_or_else_used(
    debian: object, resolve: Resolve, said: Said, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr("pytest_fcvm.kernel.sources.MODULES_REVISION", 1)
        first = resolve()
    assert resolve() == resolve() == first
    assert len(said) == 2, "it is downloaded once more, and then kept"
    monkeypatch.setattr("pytest_fcvm.kernel.sources.MODULES_REVISION", 3)
    request.getfixturevalue("no_apt")
    assert resolve() == first


def test_an_unpacked_kernel_that_has_changed_is_downloaded_again(debian: object, resolve: Resolve, said: Said) -> None:
    first = resolve()
    data = bytearray(first.bzimage.read_bytes())
    data[-1] ^= 1
    first.bzimage.write_bytes(data)
    again = resolve()
    assert again == first
    assert again.bzimage.read_bytes() != data
    assert any("guest kernel has changed" in line for line in said)


def test_the_files_of_a_killed_download_are_removed(debian: object, resolve: Resolve, kernels_dir: Path) -> None:
    (kernels_dir / "kernel.tmp-1/scratch").mkdir(parents=True)
    resolve()
    assert not list(kernels_dir.glob("*.tmp-*"))


def test_a_running_download_is_not_swept(debian: Any, resolve: Resolve, kernels_dir: Path, tmp_path: Path) -> None:
    sweep = "import sys, pathlib; from pytest_fcvm.host.supervisor.janitor import sweep_temporary"
    sweep += "; print(sweep_temporary(pathlib.Path(sys.argv[1])))"
    command = shlex.join([sys.executable, "-c", sweep, str(kernels_dir)])
    debian.during_download(f"{command} > {shlex.quote(str(tmp_path / 'swept'))}")
    with Collection(path=kernels_dir).locked("kernel", "test", print):
        resolve()
    assert (tmp_path / "swept").read_text() == "[]\n"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "echo 'E: Failed to fetch: 404 Not Found' >&2; exit 100",
            ": apt-get failed with exit code 100.*404 Not Found",
        ),
        ("for n; do echo junk > $n.deb; done; exit 0", ": dpkg-deb failed"),
        ("exit 0", "has 0 kernels"),
    ],
)
def test_a_failed_download_is_a_reason_and_leaves_no_files(
    script: str, reason: str, debian: Any, resolve: Resolve, kernels_dir: Path
) -> None:
    debian.during_download(script)
    with pytest.raises(HostError, match=reason):
        resolve()
    assert not list(kernels_dir.iterdir())


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv (util-linux) is not installed")
def test_a_download_ends_when_its_process_is_killed(debian: Any, kernels_dir: Path, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    debian.during_download(f"echo $$ > '{pid_file}.new'; mv '{pid_file}.new' '{pid_file}'; exec sleep 600")
    script = (
        "import pathlib, sys; from pytest_fcvm.kernel.sources import resolve_kernel\n"
        "resolve_kernel(option='stock', kernels_dir=pathlib.Path(sys.argv[1]), progress=print)"
    )
    with subprocess.Popen([sys.executable, "-c", script, kernels_dir], stdout=subprocess.DEVNULL) as owner:
        assert wait_until(pid_file.exists, Deadline(20))
        apt_get = os.pidfd_open(int(pid_file.read_text()))
        owner.kill()
    try:
        assert select.select([apt_get], [], [], 5.0)[0], "apt-get goes on"
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(apt_get, signal.SIGKILL)
        os.close(apt_get)


def test_a_package_without_modules_is_a_reason(apt: Any, tmp_path: Path, bzimage: Any, resolve: Resolve) -> None:
    bzimage(f"root/boot/vmlinuz-{RELEASE}", b"")
    apt.add("linux-image-cloud-amd64", None, (f"  Depends: linux-image-{RELEASE}",))
    apt.add(f"linux-image-{RELEASE}", tmp_path / "root")
    with pytest.raises(HostError, match=f"no modules for {RELEASE}"):
        resolve()


# -- the others


def test_an_installed_kernel_wheel_comes_first_and_is_not_imported(
    debian: object, tmp_path: Path, bzimage: Any, resolve: Resolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = bzimage("site/pytest_fcvm_kernel_x86_64/bzImage", b"", release="6.12.117")
    (image.parent / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.delitem(sys.modules, WHEEL)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    kernel = resolve()
    assert (kernel.bzimage, kernel.modules_dir) == (image, None)
    assert kernel.origin == "package pytest_fcvm_kernel_x86_64"


def test_the_stock_kernel_is_a_distributions_even_with_the_wheel_installed(
    no_apt: None, tmp_path: Path, bzimage: Any, resolve: Resolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = bzimage("site/pytest_fcvm_kernel_x86_64/bzImage", b"", release="6.12.117")
    (image.parent / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, WHEEL)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert resolve().bzimage == image
    with pytest.raises(HostError, match="no guest kernel: apt-get is not installed"):
        resolve(option="stock")


@pytest.mark.parametrize("place", ["boot/vmlinuz-{}", "lib/modules/{}/vmlinuz"])
def test_the_hosts_own_kernel_is_the_last_resort(
    place: str, no_apt: None, tmp_path: Path, bzimage: Any, modules_tree: Any, resolve: Resolve
) -> None:
    release = os.uname().release
    tree = modules_tree(tmp_path / "root/lib/modules" / release)
    image = bzimage(f"root/{place.format(release)}", b"", release=release)
    kernel = resolve()
    assert (kernel.bzimage, kernel.modules_dir) == (image, tree)
    assert kernel.origin == f"the host's own ({image})"


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
def test_a_host_kernel_that_only_root_may_read_is_a_reason(no_apt: None, bzimage: Any, resolve: Resolve) -> None:
    bzimage(f"root/boot/vmlinuz-{os.uname().release}", b"").chmod(0)
    with pytest.raises(HostError, match="is not readable"):
        resolve()


def test_without_any_kernel_the_error_has_the_reason_of_every_source(
    no_apt: None, resolve: Resolve, kernels_dir: Path
) -> None:
    with pytest.raises(HostError) as caught:
        resolve()
    assert caught.value.message.startswith("no guest kernel: apt-get is not installed; the host's own kernel ")
    assert caught.value.message.endswith("is not there")
    assert "apt-get update" in caught.value.hint
    assert "--fcvm-kernel PATH" in caught.value.hint
    assert not list(kernels_dir.iterdir())


def test_an_apt_without_lists_is_a_reason(apt: object, resolve: Resolve) -> None:
    with pytest.raises(HostError, match="apt knows no kernel for virtual machines"):
        resolve()
