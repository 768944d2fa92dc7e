"""Root filesystems, built by the real mksquashfs and read by the real unsquashfs."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import tarfile
import threading
from pathlib import Path

import pytest
from fakes.images import HandmadeImage, directory, entry, hardlink, symlink, tar_of

from pytest_fcvm.errors import HostError, ImageError
from pytest_fcvm.host import own
from pytest_fcvm.image import rootfs
from pytest_fcvm.image.reference import parse_reference
from pytest_fcvm.image.rootfs import build_rootfs
from pytest_fcvm.image.source import PullPolicy, resolve_image

pytestmark = [
    pytest.mark.skipif(not shutil.which(tool), reason=f"{tool} is not installed")
    for tool in ("mksquashfs", "unsquashfs", "skopeo")
]

CAPABILITY = b"\x01\x00\x00\x02\x00\x20\x00\x00" + bytes(12)  # cap_net_raw=ep
LONG = "/".join(["long" * 20] * 4)
LOWER = tar_of(
    directory("bin", 0o755),
    entry("bin/su", b"su", mode=0o4755),
    entry("bin/ping", b"ping", pax_headers={"SCHILY.xattr.security.capability": CAPABILITY.decode()}),
    entry("home/user/.x", b"x", uid=1000, gid=3_000_000, mode=0o600, mtime=1_600_000_000),
    entry("dev/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
    entry("dev/sda", type=tarfile.BLKTYPE, devmajor=8, devminor=1, mode=0o660),
    entry("run/pipe", type=tarfile.FIFOTYPE, mode=0o600),
    entry("big", bytes(200_000) + b"end"),
    entry("empty"),
    entry(LONG, b"long"),
    symlink("sh", "bin/dash"),
    entry("old", b"old"),
)
UPPER = tar_of(hardlink("kept", "old"), entry(".wh.old"), hardlink("sh2", "sh"), entry("bin/.wh.nothing"))


def pulled(directory, source, base, said=None):
    directory.mkdir(exist_ok=True)
    return resolve_image(
        parse_reference(source, base=base),
        images_dir=directory,
        pull=PullPolicy.MISSING,
        progress=said.append if said is not None else lambda _text: None,
    )


@pytest.fixture
def build(tmp_path):
    """Build the root filesystem of an image named `dir:image` or a path in tmp_path."""

    def build_one(source="dir:image", name="rootfs.squashfs"):
        dest = tmp_path / "out" / name
        dest.parent.mkdir(exist_ok=True)
        image = pulled(tmp_path / "images", source, tmp_path)
        try:
            build_rootfs(image, dest, progress=lambda _text: None)
        finally:
            image.discard()
        return dest

    return build_one


def listing(squashfs):
    """Return each path's line of `unsquashfs -lln` as (mode, owners, size or device, time, target)."""
    command = ["unsquashfs", "-UTC", "-lln", squashfs]
    lines = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()
    found = {}
    for line in lines:
        match = re.fullmatch(r"(\S{10}) (\d+/\d+) +(\d+(?:, *\d+)?) (\S+ \S+) squashfs-root(\S*)(?: -> (.*))?", line)
        if match:
            mode, owners, size, time, path, target = match.groups()
            found[path] = (mode, owners, re.sub(r"\s", "", size), time, target)
    return found


@pytest.mark.parametrize("compression", ["plain", "gzip", "zstd"])
def test_a_root_filesystem_has_everything_of_its_image(tmp_path, build, compression):
    if not shutil.which(compression) and compression == "zstd":
        pytest.skip("zstd is not installed")
    HandmadeImage(layers=[LOWER, UPPER], compression=compression, oci=compression == "zstd").write_dir(
        tmp_path / "image"
    )
    found = listing(build())
    assert found[""][:2] == ("drwxr-xr-x", "0/0")
    assert found[""][3] == "1970-01-01 00:00"
    assert found["/bin/su"][0] == "-rwsr-xr-x"
    assert found["/home/user/.x"][:4] == ("-rw-------", "1000/3000000", "1", "2020-09-13 12:26")
    assert found["/dev/null"][0] == "crw-rw-rw-"
    assert found["/dev/null"][2] == "1,3"
    assert found["/dev/sda"][0] == "brw-rw----"
    assert found["/run/pipe"][0].startswith("p")
    assert found["/big"][2] == "200003"
    assert found["/sh"][4] == found["/sh2"][4] == "bin/dash"
    assert f"/{LONG}" in found
    assert "/old" not in found


def test_contents_hard_links_and_xattrs_survive(tmp_path, build):
    layer = tar_of(
        entry("a", b"data" * 50_000, pax_headers={"SCHILY.xattr.user.mine": "a\udcff\n=b"}),
        hardlink("b", "a"),
        entry("c", bytes(300_000) + b"end"),
    )
    HandmadeImage(layers=[layer]).write_dir(tmp_path / "image")
    subprocess.run(["unsquashfs", "-n", "-d", tmp_path / "x", build()], stdout=subprocess.DEVNULL, check=True)
    assert (tmp_path / "x/a").read_bytes() == b"data" * 50_000
    assert (tmp_path / "x/c").read_bytes() == bytes(300_000) + b"end"
    assert (tmp_path / "x/a").stat().st_ino == (tmp_path / "x/b").stat().st_ino
    assert os.getxattr(tmp_path / "x/a", "user.mine") == b"a\xff\n=b"


@pytest.mark.parametrize("start", ["/", "./", "../", "../../", "//", "a/../", ""])
@pytest.mark.parametrize("length", [99, 100, 101, 255, 256, 4095])
def test_a_symbolic_link_keeps_every_byte_of_its_target(tmp_path, build, start, length):
    target = (start + "abc/" * 1024)[: length - 1] + "z"
    wide = entry(f"{LONG}/l", type=tarfile.SYMTYPE, linkname=target, uid=3_000_000)
    HandmadeImage(layers=[tar_of(symlink("l", target), wide, entry("after", b"data"))]).write_dir(tmp_path / "image")
    subprocess.run(["unsquashfs", "-n", "-d", tmp_path / "x", build()], stdout=subprocess.DEVNULL, check=True)
    assert os.readlink(tmp_path / "x/l") == target  # noqa: PTH115  Path would drop `./`
    assert os.readlink(tmp_path / "x" / LONG / "l") == target  # noqa: PTH115
    assert (tmp_path / "x" / LONG / "l").lstat().st_uid == (3_000_000 if os.geteuid() == 0 else os.geteuid())
    assert (tmp_path / "x/after").read_bytes() == b"data"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may unpack file capabilities and become another user")
def test_another_user_builds_the_same_with_owners_devices_and_file_capabilities(tmp_path, build, monkeypatch):
    HandmadeImage(layers=[LOWER, UPPER]).write_dir(tmp_path / "image")
    as_root = listing(build(name="root"))
    shim = tmp_path / "bin" / "mksquashfs"
    shim.parent.mkdir()
    real = shutil.which("mksquashfs")
    shim.write_text(f'#!/bin/sh\nexec setpriv --reuid 65534 --regid 65534 --clear-groups {real} "$@"\n')
    shim.chmod(0o755)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    monkeypatch.chdir(tmp_path / "open")  # other users may not open the parents, so use a relative path
    monkeypatch.setenv("PATH", f"{shim.parent}:{os.environ['PATH']}")
    image = pulled(tmp_path / "images", "dir:image", tmp_path)
    build_rootfs(image, Path("nobody"), progress=lambda _text: None)
    image.discard()
    assert Path("nobody").stat().st_uid == 65534
    built = listing("nobody")
    built[""] = as_root[""]  # the caller owns mksquashfs's root; a guest sees the overlay's upper layer instead
    assert built == as_root
    subprocess.run(["unsquashfs", "-n", "-d", tmp_path / "x", "nobody", "bin"], stdout=subprocess.DEVNULL, check=True)
    assert os.getxattr(tmp_path / "x/bin/ping", "security.capability") == CAPABILITY


def test_the_same_image_makes_the_same_bytes_at_any_time(tmp_path, build, monkeypatch):
    HandmadeImage(layers=[LOWER, UPPER]).write_dir(tmp_path / "image")
    first = build(name="first").read_bytes()
    os.utime(tmp_path / "out/first", (1, 1))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    clock = int(tmp_path.stat().st_ctime)
    while int((tmp_path / "out/first").stat().st_ctime) == clock:  # mksquashfs would write the next second
        os.utime(tmp_path / "out/first")
    assert build(name="second").read_bytes() == first


def test_a_tar_of_a_root_filesystem_is_not_changed(tmp_path, build):
    (tmp_path / "fs.tar").write_bytes(tar_of(directory("./"), entry("./.wh.a", b"plain"), entry("a")))
    assert {"/.wh.a", "/a"} <= set(listing(build("fs.tar")))


def test_a_directory_becomes_a_root_filesystem_owned_by_root(tmp_path, build):
    root = tmp_path / "tree"
    (root / "etc").mkdir(parents=True)
    (root / "etc/a").write_bytes(b"data")
    (root / "etc/a").chmod(0o640)
    (root / "etc/b").hardlink_to(root / "etc/a")
    (root / "link").symlink_to("etc/a")
    (root / "directory-link").symlink_to("etc")
    os.mkfifo(root / "fifo", 0o600)
    (root / "etc/a").touch()
    squashfs = build("./tree")
    found = listing(squashfs)
    subprocess.run(["unsquashfs", "-n", "-d", tmp_path / "x", squashfs, "etc"], stdout=subprocess.DEVNULL, check=True)
    assert (tmp_path / "x/etc/a").read_bytes() == b"data"
    assert (tmp_path / "x/etc/a").samefile(tmp_path / "x/etc/b")
    assert found["/etc/a"][:3] == ("-rw-r-----", "0/0", "4")
    assert found["/link"][4] == "etc/a"
    assert found["/directory-link"][4] == "etc"
    assert found["/fifo"][0].startswith("p")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_root_owns_the_callers_files_and_other_owners_stay(tmp_path, build, monkeypatch):
    root = tmp_path / "tree"
    root.mkdir()
    for name, owner in (("mine", 1234), ("other", 77)):
        (root / name).touch()
        os.chown(root / name, owner, owner)
    monkeypatch.setattr(own.os, "geteuid", lambda: 1234)
    monkeypatch.setattr(own.os, "getegid", lambda: 1234)
    found = listing(build("./tree"))
    assert found["/mine"][1] == "0/0"
    assert found["/other"][1] == "77/77"


def test_an_invalid_layer_leaves_no_file(tmp_path, build):
    HandmadeImage(layers=[tar_of(entry("a", bytes(5_000_000))), tar_of(hardlink("b", "nothing"))]).write_dir(
        tmp_path / "image"
    )
    with pytest.raises(ImageError, match="which does not exist"):
        build()
    assert list((tmp_path / "out").iterdir()) == []
    assert [path.name.split("-")[0] for path in (tmp_path / "images").iterdir()] == ["reference"]


def test_a_layer_damaged_on_disk_is_an_image_error(tmp_path, build):
    image = pulled(tmp_path / "images", f"dir:{HandmadeImage(layers=[LOWER]).write_dir(tmp_path / 'image')}", tmp_path)
    layer = image.layers[0].path
    layer.write_bytes(layer.read_bytes()[:-1] + b"\xff")
    dest = tmp_path / "rootfs"
    with pytest.raises(ImageError, match="damaged"):
        build_rootfs(image, dest, progress=lambda _text: None)
    image.discard()
    assert not dest.exists()


def test_a_full_disk_is_a_host_error_that_names_the_directory(tmp_path, build, monkeypatch):
    """A limit on the file size replaces a full disk: mksquashfs sees a failed write in both cases."""
    noise = os.urandom(3_000_000)
    HandmadeImage(layers=[tar_of(entry("noise", noise))], compression="plain").write_dir(tmp_path / "image")
    shim = tmp_path / "bin" / "mksquashfs"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/bash\nulimit -f 500\ntrap "" XFSZ\nexec {shutil.which("mksquashfs")} "$@"\n')
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shim.parent}:{os.environ['PATH']}")
    with pytest.raises(HostError, match="no room left") as caught:
        build()
    assert str(tmp_path / "out") in caught.value.message
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_for_the_decompressed_layers_is_a_host_error(tmp_path, build):
    HandmadeImage(layers=[tar_of(entry("zeros", bytes(30_000_000)))]).write_dir(tmp_path / "image")
    image = pulled(tmp_path / "images", "dir:image", tmp_path)
    assert image.layers
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, before[1]))
    try:
        with pytest.raises(HostError, match="cannot build the root filesystem in"):
            build_rootfs(image, tmp_path / "rootfs", progress=lambda _text: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        image.discard()
    assert not (tmp_path / "rootfs").exists()


def test_without_mksquashfs_the_error_names_the_package(tmp_path, build, monkeypatch):
    (tmp_path / "fs.tar").write_bytes(tar_of(entry("a")))
    monkeypatch.setattr(own.shutil, "which", lambda *_args, **_kw: None)
    with pytest.raises(HostError) as caught:
        build("fs.tar")
    assert caught.value.hint == "apt-get install squashfs-tools"


def test_the_error_of_a_failed_mksquashfs_is_quoted(tmp_path, build, monkeypatch):
    shim = tmp_path / "bin" / "mksquashfs"
    shim.parent.mkdir()
    shim.write_text("#!/bin/sh\necho nothing works today >&2\nexit 3\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shim.parent}:{os.environ['PATH']}")
    (tmp_path / "fs.tar").write_bytes(tar_of(entry("a", bytes(10_000_000))))
    with pytest.raises(HostError, match="mksquashfs failed with exit code 3: nothing works today"):
        build("fs.tar")


def test_a_mksquashfs_that_hangs_is_killed_at_the_deadline(tmp_path, build, monkeypatch):
    shim = tmp_path / "bin" / "mksquashfs"
    shim.parent.mkdir()
    shim.write_text("#!/bin/sh\nexec sleep 1000\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shim.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(rootfs, "_DEADLINE_S", 0.2)
    (tmp_path / "fs.tar").write_bytes(tar_of(entry("a", bytes(10_000_000))))
    with pytest.raises(HostError, match="mksquashfs did not end within"):
        build("fs.tar")
    assert [
        thread for thread in threading.enumerate() if isinstance(thread, threading.Timer) and thread.is_alive()
    ] == []
