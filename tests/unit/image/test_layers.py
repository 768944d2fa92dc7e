"""The rules that make one root filesystem from layers."""

from __future__ import annotations

import gzip
import tarfile

import pytest
from fakes.images import directory, entry, hardlink, symlink, tar_of

from pytest_fcvm.errors import ImageError
from pytest_fcvm.image.members import Limits


def test_a_later_layer_replaces_a_file_and_each_path_comes_once(flat):
    result = flat(tar_of(entry("etc/a", b"old"), entry("etc/b", b"b")), tar_of(entry("etc/a", b"new")))
    assert result.names == ["etc", "etc/a", "etc/b"]
    assert result.read("etc/a") == b"new"


def test_a_whiteout_removes_the_file_of_a_lower_layer(flat):
    assert flat(tar_of(entry("a"), entry("b")), tar_of(entry(".wh.a"))).names == ["b"]


def test_a_whiteout_removes_a_whole_directory(flat):
    lower = tar_of(directory("d"), entry("d/e/f"), entry("g"))
    assert flat(lower, tar_of(entry(".wh.d"))).names == ["g"]


def test_a_whiteout_does_not_touch_its_own_layer_wherever_it_stands(flat):
    lower = tar_of(entry("a", b"old"))
    before = flat(lower, tar_of(entry(".wh.a"), entry("a", b"new")))
    after = flat(lower, tar_of(entry("a", b"new"), entry(".wh.a")))
    assert before.read("a") == after.read("a") == b"new"


def test_a_whiteout_of_what_is_not_there_is_no_error(flat):
    assert flat(tar_of(entry("a")), tar_of(entry(".wh.b"), entry("x/.wh.y"), entry("x/.wh..wh..opq"))).names == ["a"]


@pytest.mark.parametrize("marker_first", [True, False])
def test_an_opaque_directory_hides_only_lower_layers_in_any_order(flat, marker_first):
    lower = tar_of(entry("d/old"), entry("d/sub/old"), entry("keep"))
    added = [entry("d/sub/new"), entry("d/new")]
    marker = [entry("d/.wh..wh..opq")]
    upper = tar_of(directory("d"), *(marker + added if marker_first else added + marker))
    assert flat(lower, upper).files == ["d/new", "d/sub/new", "keep"]


def test_an_opaque_root_hides_everything(flat):
    assert flat(tar_of(entry("a"), entry("b/c")), tar_of(entry("d"), entry(".wh..wh..opq"))).names == ["d"]


def test_other_aufs_metadata_is_left_out(flat):
    assert flat(tar_of(entry(".wh..wh.plnk/1.2"), entry(".wh..wh.aufs"), entry("a"))).files == ["a"]


def test_whiteout_names_are_plain_names_in_a_root_filesystem(flat):
    assert flat(tar_of(entry(".wh.a"), entry("a")), whiteouts=False).names == [".wh.a", "a"]


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh...", "d/.wh..."])
def test_a_whiteout_of_nothing_or_of_the_parent_is_refused(flat, name):
    with pytest.raises(ImageError, match="whiteout without a name"):
        flat(tar_of(entry(name)))


def test_a_directory_over_a_directory_keeps_the_children_and_takes_the_attributes(flat):
    result = flat(tar_of(directory("d", 0o700, uid=1), entry("d/a")), tar_of(directory("d", 0o1777, uid=5, mtime=9)))
    member = result.member("d")
    assert (member.mode, member.uid, member.mtime) == (0o1777, 5, 9)
    assert "d/a" in result.names


@pytest.mark.parametrize("upper", [entry("d", b"file"), symlink("d", "elsewhere")])
def test_anything_else_over_a_directory_removes_it(flat, upper):
    assert flat(tar_of(directory("d"), entry("d/a")), tar_of(upper)).names == ["d"]


@pytest.mark.parametrize("lower", [entry("d", b"file"), symlink("d", "etc")])
def test_a_directory_over_anything_else_replaces_it(flat, lower):
    result = flat(tar_of(directory("etc"), lower), tar_of(directory("d"), entry("d/a")))
    assert result.names == ["d", "d/a", "etc"]


def test_missing_parents_are_made_for_root(flat):
    result = flat(tar_of(entry("a/b/c", uid=5)))
    assert [(member.name, member.mode, member.uid) for member in result.members if member.isdir()] == [
        ("a", 0o755, 0),
        ("a/b", 0o755, 0),
    ]


def test_a_hard_link_may_name_a_file_of_a_lower_layer(flat):
    result = flat(tar_of(entry("a", b"data", mode=0o4755, uid=3)), tar_of(hardlink("b", "a")))
    assert result.member("b").islnk()
    assert result.member("b").linkname == "a"
    assert result.read("b") == b"data"


def test_a_hard_link_keeps_the_data_of_a_target_that_is_whited_out_later(flat):
    result = flat(tar_of(entry("a", b"data")), tar_of(hardlink("b", "a")), tar_of(entry(".wh.a")))
    assert result.names == ["b"]
    assert result.read("b") == b"data"


@pytest.mark.parametrize("marker", [".wh.a", ".wh..wh..opq"])
@pytest.mark.parametrize("marker_first", [True, False])
def test_a_hard_link_keeps_the_data_of_a_target_that_its_own_layer_removes(flat, marker, marker_first):
    upper = [entry(marker), hardlink("b", "a")]
    result = flat(tar_of(entry("a", b"data")), tar_of(*(upper if marker_first else upper[::-1])))
    assert result.names == ["b"]
    assert result.read("b") == b"data"


def test_a_hard_link_to_a_file_in_a_removed_directory_keeps_its_data(flat):
    result = flat(tar_of(entry("d/e/a", b"data")), tar_of(entry(".wh.d"), hardlink("b", "d/e/a")))
    assert result.names == ["b"]
    assert result.read("b") == b"data"


def test_a_replaced_file_does_not_change_its_other_names(flat):
    result = flat(tar_of(entry("a", b"old"), hardlink("b", "a")), tar_of(entry("a", b"new")))
    assert (result.read("a"), result.read("b")) == (b"new", b"old")


def test_a_hard_link_may_name_a_symbolic_link_or_go_through_one(flat):
    layer = tar_of(entry("usr/bin/x", b"data"), symlink("bin", "usr/bin"), hardlink("y", "bin/x"), hardlink("l", "bin"))
    result = flat(layer)
    assert result.read("y") == b"data"
    assert result.member("l").linkname in ("bin", "usr/bin")


@pytest.mark.parametrize("target", ["nothing", "d", "../a"])
def test_a_hard_link_to_nothing_a_directory_or_the_outside_is_refused(flat, target):
    with pytest.raises(ImageError):
        flat(tar_of(directory("d"), entry("a"), hardlink("b", target)))


@pytest.mark.parametrize("target", ["usr/bin", "/usr/bin", "./usr/../usr/bin"])
def test_a_symbolic_link_among_the_parents_is_followed_inside_the_root(flat, target):
    lower = tar_of(directory("usr/bin"), symlink("bin", target))
    result = flat(lower, tar_of(entry("bin/x", b"data")))
    assert result.read("usr/bin/x") == b"data"
    assert result.member("bin").issym()


def test_a_whiteout_follows_symbolic_links_among_its_parents(flat):
    lower = tar_of(entry("usr/bin/x"), entry("usr/bin/y"), symlink("bin", "usr/bin"))
    assert flat(lower, tar_of(entry("bin/.wh.x"))).files == ["bin", "usr/bin/y"]


def test_a_dangling_symbolic_link_among_the_parents_gets_its_target(flat):
    assert flat(tar_of(symlink("run", "var/run"), entry("run/pid"))).names == ["run", "var", "var/run", "var/run/pid"]


@pytest.mark.parametrize("target", ["../outside", "/../outside", "d/../../outside"])
def test_writing_through_a_symbolic_link_that_leaves_the_root_is_refused(flat, target):
    with pytest.raises(ImageError, match="leaves the root"):
        flat(tar_of(directory("d"), symlink("l", target)), tar_of(entry("l/x")))


def test_a_symbolic_link_that_leaves_the_root_may_lie_there(flat):
    assert flat(tar_of(symlink("l", "../../outside"))).member("l").linkname == "../../outside"


def test_a_loop_of_symbolic_links_is_refused(flat):
    with pytest.raises(ImageError, match="too many symbolic links"):
        flat(tar_of(symlink("a", "b"), symlink("b", "a"), entry("a/x")))


def test_a_file_below_a_file_is_refused(flat):
    with pytest.raises(ImageError, match="a parent is a file"):
        flat(tar_of(entry("a")), tar_of(entry("a/b")))


@pytest.mark.parametrize("name", ["/opt/a", "//opt/a", "./opt/a", "opt/../opt/a", "/../opt/a", "b/./../opt//a"])
def test_a_name_starts_at_the_root_however_it_is_written(flat, name):
    result = flat(tar_of(entry(name, b"data"), hardlink("/b/c", name)))
    assert result.read("opt/a" if result.member("opt/a").isfile() else "b/c") == b"data"
    assert result.read("b/c") == b"data"
    assert flat(tar_of(entry("opt/a"), entry("opt/b")), tar_of(entry("/x/../opt/.wh.a"))).files == ["opt/b"]


@pytest.mark.parametrize("name", ["../a", "a/../../b", "d/..", "x" * 300, "y/" * 2100])
def test_a_name_that_leaves_the_root_or_is_too_long_is_refused(flat, name):
    with pytest.raises(ImageError, match="is invalid"):
        flat(tar_of(entry(name)))


@pytest.mark.parametrize("target", ["", "x" * 5000])
def test_a_symbolic_link_with_an_invalid_target_is_refused(flat, target):
    with pytest.raises(ImageError, match="invalid target"):
        flat(tar_of(symlink("a", target)))


@pytest.mark.parametrize("name", ["/", ".", "./"])
def test_the_root_itself_may_be_an_entry(flat, name):
    assert flat(tar_of(directory(name), entry("./a"))).names == ["a"]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_of_both_formats_are_kept(flat, format):  # noqa: A002
    name, target = "/".join(["n" * 90] * 5), "t" * 150
    result = flat(tar_of(entry(name, b"data"), symlink("l", target), format=format))
    assert result.read(name) == b"data"
    assert result.member("l").linkname == target


def test_extended_headers_of_every_length_are_correct(flat):
    """The length before a record counts its own digits, so the steps from 99 to 100 and to 1000 are special."""
    lengths = [*range(80, 130), *range(960, 1030)]
    layer = tar_of(*(entry(str(number), pax_headers={"SCHILY.xattr.user.x": "v" * number}) for number in lengths))
    for member in flat(layer).members:
        assert member.pax_headers["SCHILY.xattr.user.x"] == "v" * int(member.name)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_owners_and_times_beyond_octal_are_kept(flat, format):  # noqa: A002
    member = flat(tar_of(entry("a", uid=3_000_000, gid=0xFFFFFFFE, mtime=1_700_000_000), format=format)).member("a")
    assert (member.uid, member.gid, member.mtime) == (3_000_000, 0xFFFFFFFE, 1_700_000_000)


def test_times_before_1970_and_fractions_are_rounded_for_squashfs(flat):
    result = flat(tar_of(entry("a", mtime=-5), entry("b", mtime=7.9), entry("c", mtime=2**40)))
    assert [member.mtime for member in result.members] == [0, 7, 2**32 - 1]


def test_setuid_devices_and_fifos_are_kept(flat):
    result = flat(
        tar_of(
            entry("su", mode=0o4755),
            entry("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
            entry("sda", type=tarfile.BLKTYPE, devmajor=8, devminor=0),
            entry("pipe", type=tarfile.FIFOTYPE),
        )
    )
    assert result.member("su").mode == 0o4755
    null = result.member("null")
    assert (null.type, null.devmajor, null.devminor) == (tarfile.CHRTYPE, 1, 3)
    assert result.member("sda").isblk()
    assert result.member("pipe").isfifo()


def test_overlayfs_own_whiteouts_and_xattrs_are_dropped(flat):
    xattrs = {
        "SCHILY.xattr.trusted.overlay.opaque": "y",
        "SCHILY.xattr.user.overlay.origin": "x",
        "SCHILY.xattr.system.posix_acl_access": "z",
        "SCHILY.xattr.user.mine": "kept",
    }
    whiteout = entry("gone", type=tarfile.CHRTYPE, devmajor=0, devminor=0)
    result = flat(tar_of(directory("d", pax_headers=xattrs), whiteout))
    assert result.names == ["d"]
    assert {key for key in result.member("d").pax_headers if key.startswith("SCHILY")} == {"SCHILY.xattr.user.mine"}


def test_a_binary_xattr_survives_byte_by_byte(flat):
    # a file capability, cap_net_raw=ep: vfs_cap_data of linux/capability.h, with special bytes after it
    capability = b"\x01\x00\x00\x02\x00\x20\x00\x00" + bytes(12) + b"\xff\xfe\n=\x80"
    text = capability.decode("utf-8", "surrogateescape")
    member = flat(tar_of(_with_raw_xattr("ping", "security.capability", capability))).member("ping")
    assert member.pax_headers["SCHILY.xattr.security.capability"] == text


def _with_raw_xattr(name: str, key: str, value: bytes) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, pax_headers={f"SCHILY.xattr.{key}": value.decode("utf-8", "surrogateescape")})


@pytest.mark.parametrize("name", ["caf\u00e9", "\udcff\udcfe", "new\nline", "tab\t'\"\\"])
def test_names_of_any_bytes_survive(flat, name):
    assert flat(tar_of(entry(f"d/{name}", b"data"))).read(f"d/{name}") == b"data"


def test_the_output_does_not_depend_on_the_order_within_a_layer(flat):
    entries = [directory("d"), entry("d/a", b"1"), entry("b", b"2"), symlink("c", "b"), hardlink("e", "b")]
    assert flat(tar_of(*entries)).stream == flat(tar_of(entries[2], entries[4], entries[3], *entries[:2])).stream


def test_parents_come_before_their_children(flat):
    names = flat(tar_of(entry("z/y/x"), entry("a/b"), directory("a"))).names
    for name in names:
        parent = name.rpartition("/")[0]
        assert not parent or names.index(parent) < names.index(name)


def test_an_empty_layer_changes_nothing(flat):
    assert flat(tar_of(entry("a")), b"", bytes(1024), tar_of()).names == ["a"]


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        (Limits(entries=2), "too many files"),
        (Limits(unpacked_bytes=20_000), "more than"),
        (Limits(path_bytes=3), "too long"),
    ],
)
def test_limits_are_enforced(flat, limits, match):
    with pytest.raises(ImageError, match=match):
        flat(tar_of(entry("a", bytes(9000)), entry("b", bytes(9000))), tar_of(entry("ccc", bytes(9000))), limits=limits)


def test_a_compressed_layer_is_unpacked_up_to_the_limit_for_all_layers(flat):
    lower, bomb = tar_of(entry("a", bytes(1 << 20))), gzip.compress(tar_of(entry("b", bytes(4 << 20))))
    with pytest.raises(ImageError, match="a layer of the image unpacks to more than 1 MiB"):
        flat(lower, bomb, limits=Limits(unpacked_bytes=(2 << 20) + 50_000))
