"""Tar streams into and out of the guest."""

import io
import os
import tarfile
from pathlib import Path

import pytest


def put(client, p, data, path, *more):
    stream = client.open(p.TAR_IN, (p.PATH, path), *more)
    client.wait(lambda: stream.reply)
    assert stream.reply[0] == 0
    client.write(stream, data)
    client.end_input(stream)
    client.wait(lambda: stream.exit is not None)
    return stream


def get(client, p, path):
    stream = client.open(p.TAR_OUT, (p.PATH, path))
    client.wait(lambda: stream.exit is not None, 30)
    return stream


def entry(name, kind=tarfile.REGTYPE, content=b"", **attributes):
    member = tarfile.TarInfo(name)
    member.type = kind
    member.size = len(content)
    member.mode = 0o644
    for key, value in attributes.items():
        setattr(member, key, value)
    return member, content


def archive(*entries, form=tarfile.PAX_FORMAT):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for member, content in entries:
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def shell(client, script):
    return client.run("sh", "-c", script).data[0].decode()


FORMATS = pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@FORMATS
def test_all_kinds_of_entries_are_extracted(client, p, form):
    data = archive(
        entry("d", tarfile.DIRTYPE, mode=0o750, uid=12, gid=34, mtime=1000000000),
        entry("d/file", content=b"text", mode=0o4755, uid=1000, gid=1001, mtime=1234567890),
        entry("d/link", tarfile.SYMTYPE, linkname="file"),
        entry("d/hard", tarfile.LNKTYPE, linkname="d/file"),
        entry("d/fifo", tarfile.FIFOTYPE, mode=0o600),
        entry("d/null", tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=3),
        entry("d/loop", tarfile.BLKTYPE, mode=0o640, devmajor=7, devminor=5),
        form=form,
    )
    stream = put(client, p, data, "/tmp")
    assert (stream.code, stream.exit.get(p.MESSAGE)) == (0, None)
    listing = shell(
        client, "cd /tmp; stat -c '%n %A %u %g %Y' d d/file; stat -c '%n %A %h %t,%T' d/*; cat d/link d/hard"
    )
    assert listing == (
        "d drwxr-x--- 12 34 1000000000\n"
        "d/file -rwsr-xr-x 1000 1001 1234567890\n"
        "d/fifo prw------- 1 0,0\n"
        "d/file -rwsr-xr-x 2 0,0\n"
        "d/hard -rwsr-xr-x 2 0,0\n"
        "d/link lrwxrwxrwx 1 0,0\n"
        "d/loop brw-r----- 1 7,5\n"
        "d/null crw-rw-rw- 1 1,3\n"
        "texttext"
    )


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_links_and_numbers_are_read(client, p, form):
    name = "/".join(["long" * 20] * 5) + "/" + "x" * 200
    data = archive(
        entry(name, content=b"deep", uid=3000000, gid=3000001),
        entry("link", tarfile.SYMTYPE, linkname=name),
        entry("hard", tarfile.LNKTYPE, linkname=name),
        form=form,
    )
    assert put(client, p, data, "/tmp/new/directory").code == 0
    assert shell(client, "cd /tmp/new/directory; cat link hard; stat -c '%u %g' hard") == "deepdeep3000000 3000001\n"


def test_pax_times_keep_their_fraction(client, p):
    put(client, p, archive(entry("f", mtime=1000.25)), "/tmp")
    assert shell(client, "stat -c %y /tmp/f").startswith("1970-01-01 00:16:40.250000000")


def test_extracting_replaces_files_and_leaves_existing_directories(client, p):
    shell(
        client, "mkdir -m 700 /tmp/d; echo old > /tmp/f; ln -s /etc/passwd /tmp/l; ln -s d /tmp/to_d; chown 5:6 /tmp/d"
    )
    data = archive(
        entry("d", tarfile.DIRTYPE, mode=0o777),
        entry("f", content=b"new"),
        entry("l", content=b"mine"),
        entry("to_d/inside", content=b"in d"),
    )
    assert put(client, p, data, "/tmp").code == 0
    seen = shell(client, "cd /tmp; stat -c '%a %u %g' d; cat f l d/inside; head -c 4 /etc/passwd")
    assert seen == "700 5 6\nnewminein droot"


def test_a_user_owns_all_that_is_extracted_for_them(client, p):
    data = archive(entry("a/b/f", content=b"x", uid=7), entry("c", tarfile.SYMTYPE, linkname="a", uid=7))
    assert put(client, p, data, "/tmp/home/app", (p.USER, "app")).code == 0
    seen = shell(client, "cd /tmp/home; stat -c '%u:%g' . app app/a app/a/b app/a/b/f app/c")
    assert seen.split() == ["1000:1001"] * 6


def test_absolute_names_land_below_the_target(client, p):
    assert put(client, p, archive(entry("/etc/inside", content=b"x")), "/tmp").code == 0
    assert shell(client, "ls /tmp/etc; ls /etc | grep inside") == "inside\n"


def test_in_the_root_absolute_symlinks_of_the_image_are_followed(client, p):
    assert put(client, p, archive(entry("lib/more", content=b"x")), "/").code == 0
    assert shell(client, "ls /usr/lib") == "data\nmore\n"


HOSTILE = {
    "up": [entry("../outside", content=b"x")],
    "up in the middle": [entry("a/../../outside", content=b"x")],
    "through a symlink to the root": [
        entry("link", tarfile.SYMTYPE, linkname="/"),
        entry("link/outside", content=b"x"),
    ],
    "through a symlink upwards": [
        entry("link", tarfile.SYMTYPE, linkname=".."),
        entry("link/outside", content=b"x"),
    ],
    "through a chain of symlinks": [
        entry("a", tarfile.SYMTYPE, linkname="b/.."),
        entry("b", tarfile.SYMTYPE, linkname="."),
        entry("a/outside", content=b"x"),
    ],
    "a hardlink to what is outside": [entry("hard", tarfile.LNKTYPE, linkname="../../etc/passwd")],
    "a hardlink through a symlink": [
        entry("link", tarfile.SYMTYPE, linkname="/etc"),
        entry("hard", tarfile.LNKTYPE, linkname="link/passwd"),
    ],
    "a directory through a symlink": [
        entry("link", tarfile.SYMTYPE, linkname="/tmp"),
        entry("link/outside", tarfile.DIRTYPE, mode=0o755),
    ],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_archive_cannot_leave_its_target(client, p, name):
    shell(client, "mkdir /tmp/target; echo precious > /tmp/precious")
    stream = put(client, p, archive(*HOSTILE[name]), "/tmp/target")
    assert stream.code == 1
    assert stream.message
    assert shell(client, "ls /tmp; ls / | grep outside; stat -c %h /etc/passwd") == "precious\ntarget\n1\n"


@pytest.mark.parametrize("name", HOSTILE)
def test_an_archive_cannot_leave_the_root(client, p, name):
    put(client, p, archive(*HOSTILE[name]), "/")
    assert not Path("/outside").exists()
    assert client.run("true").code == 0


BROKEN = {
    "noise": (os.urandom(5000), "checksum"),
    "one wrong bit": (archive(entry("name", content=b"x")).replace(b"name", b"nane", 1), "checksum"),
    "a path upwards": (archive(entry("a/../b", content=b"x")), "a path leads upwards: a/../b"),
    "cut in a header": (archive(entry("f", content=b"x" * 3000))[:300], "ends too early"),
    "cut in a file": (archive(entry("f", content=b"x" * 3000))[:1500], "ends too early"),
    "without an end": (archive(entry("f", content=b"x" * 512))[:1024], "ends too early"),
    "nothing": (b"", "ends too early"),
    "a directory's place taken": (archive(entry("d", content=b"x")), "replace d"),
    "an unknown type": (archive(entry("f", b"Z")), "not supported"),
    "no name": (archive(entry(".", content=b"x")), "no name"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_archive_is_refused_with_the_reason(client, p, name):
    data, message = BROKEN[name]
    shell(client, "mkdir /tmp/d")
    stream = put(client, p, data, "/tmp")
    assert stream.code == 1
    assert message in stream.message


def test_a_full_disk_is_reported(client, p):
    stream = put(client, p, archive(entry("big", content=b"x" * (300 << 20))), "/tmp")
    assert stream.code == 1
    assert "No space left on device" in stream.message


def test_a_tree_goes_out_and_comes_back_the_same(client, p):
    long = "x" * 150
    shell(
        client,
        f"mkdir -p /tmp/t/sub/{long} /tmp/t/empty; cd /tmp/t; echo one > one; ln one two; ln -s /nowhere/{long} sym;"
        f"mkfifo fifo; mknod dev c 1 5; head -c 100000 /dev/urandom > sub/{long}/{long};"
        "chown 3000000:70000 one; chmod 4711 one; chmod 700 sub; touch -d @1600000000 one empty",
    )
    stream = get(client, p, "/tmp/t")
    assert stream.code == 0
    with tarfile.open(fileobj=io.BytesIO(bytes(stream.data[0]))) as tar:
        members = {member.name: member for member in tar}
        assert next(iter(members)) == "."
        one, two = sorted((members["./one"], members["./two"]), key=lambda member: member.islnk())
        assert (one.mode, one.uid, one.gid, one.mtime) == (0o4711, 3000000, 70000, 1600000000)
        assert two.linkname == one.name
        assert members["./sym"].linkname == f"/nowhere/{long}"
        assert members["./fifo"].isfifo()
        assert (members["./dev"].ischr(), members["./dev"].devmajor, members["./dev"].devminor) == (True, 1, 5)
        assert members["./empty"].isdir()
        assert members[f"./sub/{long}/{long}"].size == 100000
        assert len(members) == 10
    assert put(client, p, bytes(stream.data[0]), "/tmp/back").code == 0
    listing = (
        "find . -exec stat -c '%n %A %u %g %h %t %T' {{}} \\; | sort; find . -type f -exec sha256sum {{}} \\; | sort"
    )
    assert shell(client, f"cd /tmp/t; {listing.format()}") == shell(client, f"cd /tmp/back; {listing.format()}")


def test_a_file_is_one_entry_under_its_base_name(client, p):
    shell(client, "mkdir /tmp/d; echo content > /tmp/d/file; ln -s d/file /tmp/link")
    for path, name in (("/tmp/d/file", "file"), ("/tmp/link", "link")):
        with tarfile.open(fileobj=io.BytesIO(bytes(get(client, p, path).data[0]))) as tar:
            (member,) = tar
            assert (member.name, member.isfile(), tar.extractfile(member).read()) == (name, True, b"content\n")


@pytest.mark.parametrize(
    "path", ["/proc/filesystems", "/proc/sys/vm/max_map_count"], ids=["of-proc", "that-is-a-kernel-setting"]
)
def test_a_file_without_a_size_has_that_of_its_contents(client, p, path):
    with tarfile.open(fileobj=io.BytesIO(bytes(get(client, p, path).data[0]))) as tar:
        (member,) = tar
        assert tar.extractfile(member).read() == client.run("cat", path).data[0]


def test_a_volume_comes_out_with_the_directory_it_is_in(client, p):
    script = "mkdir -p /tmp/t/data /tmp/t/proc; mount -t tmpfs none /tmp/t/data; mount -t proc none /tmp/t/proc"
    if client.run("sh", "-c", f"{script}; echo rows > /tmp/t/data/rows").code:
        pytest.skip("the test's user may not mount here")
    with tarfile.open(fileobj=io.BytesIO(bytes(get(client, p, "/tmp/t").data[0]))) as tar:
        assert {"./data", "./data/rows", "./proc"} <= set(tar.getnames())
        assert not [name for name in tar.getnames() if name.startswith("./proc/")]


def test_file_systems_of_the_kernel_are_left_out(client, p):
    with tarfile.open(fileobj=io.BytesIO(bytes(get(client, p, "/").data[0]))) as tar:
        names = tar.getnames()
    assert "./bin/busybox" in names
    assert "./proc" in names
    assert not [name for name in names if name.startswith("./proc/")]


@pytest.mark.parametrize(
    ("path", "message"), [("/no/such", "No such file"), ("/dev/null", "not a file"), ("", "no PATH")]
)
def test_a_path_that_cannot_be_sent_says_why(client, p, path, message):
    stream = client.open(p.TAR_OUT, (p.PATH, path))
    client.wait(lambda: stream.exit is not None or (stream.reply and stream.reply[0]))
    assert message in stream.message


def test_300_mb_go_through_in_bounded_memory(client, p):
    shell(client, "head -c 100000000 /dev/zero > /tmp/big")
    stream = get(client, p, "/tmp/big")
    assert (stream.code, len(stream.data[0])) == (0, 100000000 // 512 * 512 + 512 * 4)


AT_PLACE, HIDES = 16, 48


def place(client, p, data, path, flags=AT_PLACE, *more):
    return put(client, p, data, path, (p.FLAGS, flags), *more)


@pytest.mark.parametrize("path", ["/tmp", "/tmp/", "/link", "/link/", "/tmp/../tmp"])
def test_a_file_goes_into_an_existing_directory(client, p, path):
    shell(client, "ln -s /tmp /link; chmod 1777 /tmp")
    assert place(client, p, archive(entry("schema", content=b"text")), path).code == 0
    assert shell(client, "cat /tmp/schema; readlink /link; stat -c %a /tmp") == "text/tmp\n1777\n"


def test_a_file_gets_the_name_of_its_place_unless_that_is_a_directory(client, p):
    shell(client, "echo old > /tmp/old; ln -s old /tmp/link; ln -s /gone /tmp/dangling")
    for name in ("old", "link", "dangling", "a/b c/new"):
        assert place(client, p, archive(entry("schema", content=name.encode())), f"/tmp/{name}").code == 0
    seen = shell(client, "cd /tmp; cat old dangling a/b*/new; readlink link; ls /gone")
    assert seen == "linkdanglinga/b c/newold\n"


TREE = [
    entry("root", tarfile.DIRTYPE, mode=0o751, uid=5, gid=6, mtime=1000000000),
    entry("root/f", content=b"new", uid=7),
    entry("root/twin", tarfile.LNKTYPE, linkname="root/f"),
]


@pytest.mark.parametrize("path", ["/tmp/d", "/link", "/tmp/new/d"])
def test_a_directory_merges_with_its_place(client, p, path):
    shell(client, "mkdir -m 700 /tmp/d; echo old > /tmp/d/old; ln -s /tmp/d /link")
    assert place(client, p, archive(*TREE), path).code == 0
    made = path == "/tmp/new/d"
    old = "" if made else "old\n"
    assert shell(client, f"cd {path}/; ls; stat -c %h f") == f"f\n{old}twin\n2\n"
    assert shell(client, f"stat -c '%a %u' {path}/") == ("751 5\n" if made else "700 0\n")


@pytest.mark.parametrize("path", ["/tmp/d", "/link", "/tmp/new/d", "/tmp/file"])
def test_a_directory_that_hides_replaces_the_existing_one(client, p, path):
    shell(
        client,
        "mkdir -p -m 700 /tmp/d/sub/sub; ln -s / /tmp/d/sub/root; echo x > /tmp/d/.hidden; echo x > /tmp/d/f;"
        "ln -s /tmp/d /link; echo x > /tmp/file",
    )
    assert place(client, p, archive(*TREE), path, HIDES).code == 0
    assert shell(client, f"cd {path}/; ls -A; cat f; stat -c '%a %u %g %Y' .") == "f\ntwin\nnew751 5 6 1000000000\n"
    assert shell(client, "ls /bin/busybox") == "/bin/busybox\n"


def test_a_directory_of_the_image_is_hidden(client, p):
    assert place(client, p, archive(*TREE), "/etc", HIDES).code == 0
    assert shell(client, "ls -A /etc") == "f\ntwin\n"


def test_a_file_does_not_hide_a_directory(client, p):
    shell(client, "mkdir /tmp/d; echo x > /tmp/d/x")
    stream = place(client, p, archive(entry("f", content=b"1")), "/tmp/d", HIDES)
    assert (stream.code, stream.message) == (1, "put a file in the place of /tmp/d: Is a directory")
    assert shell(client, "ls /tmp/d") == "x\n"


def test_a_user_owns_files_at_a_place(client, p):
    assert place(client, p, archive(*TREE), "/tmp/a/b", AT_PLACE, (p.USER, "app")).code == 0
    assert shell(client, "stat -c '%u:%g' /tmp/a /tmp/a/b /tmp/a/b/f").split() == ["1000:1001"] * 3


@pytest.mark.parametrize("name", HOSTILE)
def test_an_archive_cannot_leave_its_place(client, p, name):
    shell(client, "mkdir /tmp/target; echo precious > /tmp/precious")
    place(client, p, archive(*HOSTILE[name]), "/tmp/target", HIDES)
    assert shell(client, "ls /tmp; ls / | grep outside; stat -c %h /etc/passwd") == "precious\ntarget\n1\n"


def test_long_runs_of_zeros_take_no_memory_of_the_guest(client, p):
    content = b"begin" + bytes(20 << 20) + b"end" + bytes(1 << 20)
    assert put(client, p, archive(entry("f", content=content)), "/tmp").code == 0
    size, blocks = shell(client, "stat -c '%s %b' /tmp/f").split()
    assert (int(size), int(blocks) * 512 < 1 << 20) == (len(content), True)
    assert shell(client, "tr -d '\\000' < /tmp/f") == "beginend"
