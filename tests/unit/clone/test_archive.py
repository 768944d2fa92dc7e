"""Tar streams to and from a guest. A stream from a guest may be hostile."""

from __future__ import annotations

import io
import os
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_fcvm.errors import GuestError, HostError, UsageProblem
from pytest_fcvm.host.archive import pack_path, pack_text
from pytest_fcvm.host.unpack import unpack_as, unpack_file

_Make = Callable[[tarfile.TarFile], None]


def _stream(*members: tuple[str, bytes | str | None]) -> io.BytesIO:
    """Make an archive: bytes are files, text is the target of a link (`=` in front: a hard one), None a directory."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.mode = tarfile.DIRTYPE, 0o755
            elif isinstance(content, str):
                member.type = tarfile.LNKTYPE if content.startswith("=") else tarfile.SYMTYPE
                member.linkname = content.removeprefix("=")
            else:
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content if isinstance(content, bytes) else b""))
    packed.seek(0)
    return packed


def _packed(pack: Callable[[Callable[[bytes], object]], None]) -> tarfile.TarFile:
    data = bytearray()
    pack(data.extend)
    return tarfile.open(fileobj=io.BytesIO(data))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with something beside what is unpacked, and outside of it."""
    place = tmp_path / "place"
    place.mkdir()
    (place / "precious").write_text("mine")
    (tmp_path / "precious").write_text("mine")
    return place


def test_a_directory_is_sent_whole_and_as_root(tmp_path: Path) -> None:
    source = tmp_path / "conf"
    (source / "sub").mkdir(parents=True)
    (source / "sub/script").write_text("#!")
    (source / "sub/script").chmod(0o755)
    (source / "link").symlink_to("sub/script")
    os.link(source / "sub/script", source / "twin")
    os.chown(source / "sub", os.getuid(), os.getgid())
    archive = _packed(lambda send: pack_path(source, "etc", send))
    assert sorted(archive.getnames()) == ["etc", "etc/link", "etc/sub", "etc/sub/script", "etc/twin"]
    assert {(member.uid, member.gid, member.uname, member.gname) for member in archive} == {(0, 0, "", "")}
    script = archive.getmember("etc/sub/script")
    assert script.mode & 0o777 == 0o755
    read_only = _packed(lambda send: pack_path(source, "etc", send, read_only=True))
    assert read_only.getmember("etc/sub/script").mode & 0o777 == 0o555


def test_a_source_that_is_not_there_is_a_usage_problem(tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match="gone does not exist") as caught:
        pack_path(tmp_path / "gone", "x", print)
    assert caught.value.hint == "copy_in takes an existing file or directory"


def test_text_is_sent_with_its_mode() -> None:
    archive = _packed(lambda send: pack_text("grün".encode(), "f", 0o600, send))
    (member,) = archive.getmembers()
    content = archive.extractfile(member)
    assert content is not None
    assert (member.name, member.mode, content.read().decode()) == ("f", 0o600, "grün")


def test_a_directory_comes_out_under_the_given_name(place: Path) -> None:
    unpack_as(
        _stream(
            ("./", None), ("./a", b"1"), ("./sub", None), ("./sub/b", b"2"), ("./hard", "=./a"), ("./soft", "sub/b")
        ),
        place / "out",
    )
    out = place / "out"
    assert {path.name for path in out.iterdir()} == {"a", "sub", "hard", "soft"}
    assert ((out / "hard").read_text(), (out / "soft").read_text()) == ("1", "2")
    assert (out / "hard").stat().st_ino == (out / "a").stat().st_ino


def test_a_file_comes_out_under_the_name_it_is_given(place: Path) -> None:
    unpack_as(_stream(("passwd", b"root")), place / "out")
    assert (place / "out").read_bytes() == b"root"


@pytest.mark.parametrize(
    "members",
    [
        [("./", None), ("./../precious", b"yours")],
        [("./", None), ("./x", ".."), ("./x/precious", b"yours")],
        [("./", None), ("./x", "../.."), ("./x/place/precious", b"yours")],
        [("./", None), ("./x", "/"), ("./x/tmp/precious", b"yours")],
        [("./", None), ("./d", None), ("./d/x", ".."), ("./d/x/d", ".."), ("./d/x/d/precious", b"yours")],
        [("./", None), ("./x", "=../precious"), ("./x", b"yours")],
        [("./", None), ("./x", "=/etc/passwd")],
        [("./", None), ("./x", ".."), ("./y", "=./x/precious")],
        [("./", None), ("./x", "=./gone")],
        [("./", None), ("./", b"yours")],
        [("./", None), ("./x", b""), ("./x/precious", b"yours")],
        [("./", None), ("precious", b"yours")],
        [("x", "."), ("./precious", b"yours")],
        [("x", "precious"), ("x", b"yours")],
        [("x", b""), ("precious", b"yours")],
        [("x", "../precious"), ("x", b"yours")],
    ],
)
def test_nothing_beside_what_was_asked_for_can_be_written(
    members: list[tuple[str, bytes | str | None]], place: Path
) -> None:
    with pytest.raises(GuestError, match="the guest sent"):
        unpack_as(_stream(*members), place / "out")
    assert (place / "precious").read_text() == "mine"
    assert (place.parent / "precious").read_text() == "mine"
    assert {path.name for path in place.iterdir()} <= {"precious", "out"}


@pytest.mark.parametrize("target", ["../precious", "/etc/passwd", "/dev/stdout", "../../var/log", "gone", "x"])
def test_links_stay_links_wherever_they_lead_and_nothing_is_written_through_them(target: str, place: Path) -> None:
    again = _stream(("./", None), ("./x", target), ("./x", b"ours"), ("./l", target), ("./l", None), ("./l/f", b"ours"))
    unpack_as(again, place / "out")
    assert (place / "out/x").read_text() == (place / "out/l/f").read_text() == "ours"
    unpack_as(_stream(("./", None), ("./x", target), ("./f", b"text")), place / "out")
    assert (place / "out/x").readlink() == Path(target)
    assert (place / "out/f").read_text() == "text"
    assert (place / "precious").read_text() == "mine"


def test_links_of_the_host_in_the_way_are_replaced_and_not_followed(place: Path) -> None:
    out = place / "out"
    out.mkdir()
    (out / "f").symlink_to(place / "precious")
    (out / "d").symlink_to(place)
    unpack_as(_stream(("./", None), ("./f", b"new"), ("./d", None), ("./d/precious", b"new")), out)
    assert ((out / "f").read_text(), (out / "d/precious").read_text()) == ("new", "new")
    assert (place / "precious").read_text() == "mine"


def test_devices_and_pipes_are_left_out_with_one_line(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, kind in (("./null", tarfile.CHRTYPE), ("./disk", tarfile.BLKTYPE), ("./pipe", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.devmajor, member.devminor = kind, 1, 3
            archive.addfile(member)
        member = tarfile.TarInfo("./f")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"text"))
    packed.seek(0)
    unpack_as(packed, place / "out")
    assert {path.name for path in (place / "out").iterdir()} == {"f"}
    (record,) = caplog.records
    assert record.getMessage().startswith("3 devices and pipes were not copied")
    assert "'./null, ./disk, ./pipe'" in record.getMessage()


def test_modes_and_times_are_kept_as_far_as_they_are_safe(place: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, kind, mode in (
            ("./", tarfile.DIRTYPE, 0o1777),
            ("./d", tarfile.DIRTYPE, 0o555),
            ("./d/f", tarfile.REGTYPE, 0o4777),
            ("./d/g", tarfile.REGTYPE, 0o040),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.mode, member.mtime = kind, mode, 1_000_000_000
            archive.addfile(member)
    packed.seek(0)
    unpack_as(packed, place / "out")
    seen = {path.name: path.stat() for path in (place / "out", *(place / "out").rglob("*"))}
    assert {name: oct(status.st_mode & 0o7777) for name, status in seen.items()} == {
        "out": "0o755",
        "d": "0o755",
        "f": "0o755",
        "g": "0o640",
    }
    assert {status.st_mtime for status in seen.values()} == {1_000_000_000}


def test_names_of_any_bytes_and_length_come_out(place: Path) -> None:
    names = ["\udcff\udc80", "new\nline", "n" * 255, "-rf", " ", "ü"]
    unpack_as(_stream(("./", None), *((f"./{name}", b"1") for name in names)), place / "out")
    assert {path.name for path in (place / "out").iterdir()} == set(names)


def test_long_runs_of_zeros_take_no_room(place: Path) -> None:
    content = b"begin" + bytes(8 << 20) + b"end" + bytes(1 << 20)
    unpack_as(_stream(("f", content)), place / "out")
    assert (place / "out").read_bytes() == content
    assert (place / "out").stat().st_blocks * 512 < 1 << 20


def test_a_file_is_written_into_what_is_there_and_keeps_its_mode(place: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        member = tarfile.TarInfo("tool")
        member.mode = 0o755
        archive.addfile(member)
    (place / "link").symlink_to("precious")
    unpack_as(io.BytesIO(packed.getvalue()), place / "link")
    assert (place / "link").is_symlink()
    assert (place / "precious").stat().st_mode & 0o777 == 0o755
    unpack_as(io.BytesIO(packed.getvalue()), Path("/dev/null"))
    assert Path("/dev/null").is_char_device()


def test_directories_above_are_made(place: Path) -> None:
    unpack_as(_stream(("f", b"1")), place / "a/b")
    unpack_as(_stream(("./", None), ("./f", b"1")), place / "c/d")
    assert ((place / "a/b").read_bytes(), (place / "c/d/f").read_bytes()) == (b"1", b"1")


def test_a_file_that_cannot_be_written_is_a_host_error(place: Path) -> None:
    (place / "out/f").mkdir(parents=True)
    with pytest.raises(HostError, match="f cannot be written: Is a directory"):
        unpack_as(_stream(("./", None), ("./f", b"1")), place / "out")
    with pytest.raises(HostError, match="precious cannot be written"):
        unpack_as(_stream(("f", b"1")), place / "precious/f")


def test_sparse_members_are_refused(place: Path) -> None:
    member = tarfile.TarInfo("./f")
    member.pax_headers = {"GNU.sparse.size": str(1 << 60), "GNU.sparse.numblocks": "0", "GNU.sparse.map": ""}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member)
    packed.seek(0)
    with pytest.raises(GuestError, match="the guest sent"):
        unpack_as(packed, place / "out")


def test_a_link_is_sent_as_what_it_leads_to_and_links_below_it_as_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/f").write_text("1")
    (tmp_path / "real/l").symlink_to("/nowhere")
    (tmp_path / "link").symlink_to("real")
    archive = _packed(lambda send: pack_path(tmp_path / "link", "etc", send))
    assert archive.getmember("etc").isdir()
    assert archive.getmember("etc/l").linkname == "/nowhere"
    (tmp_path / "to_f").symlink_to("link/f")
    (member,) = _packed(lambda send: pack_path(tmp_path / "to_f", "f", send))
    assert (member.isreg(), member.size) == (True, 1)
    (tmp_path / "dangling").symlink_to("gone")
    with pytest.raises(UsageProblem, match="dangling is a link without a target"):
        pack_path(tmp_path / "dangling", "x", print)


def test_owners_are_kept_where_they_are_wanted(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("1")
    (member,) = _packed(lambda send: pack_path(tmp_path / "f", "f", send, keeps_owner=True))
    assert (member.uid, member.gid) == (os.getuid(), os.getgid())


def test_odd_names_pipes_and_sockets_are_sent_or_left_out(tmp_path: Path) -> None:
    source = tmp_path / "s"
    source.mkdir()
    names = {"n" * 255, "\udcff", "new\nline", "-rf"}
    for name in names:
        (source / name).write_text("")
    os.mkfifo(source / "pipe")
    (source / "empty").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(source / "sock"))
        archive = _packed(lambda send: pack_path(source, "s", send))
    assert set(archive.getnames()) == {"s", "s/pipe", "s/empty", *(f"s/{name}" for name in names)}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_cannot_be_read_is_a_usage_problem(tmp_path: Path) -> None:
    (tmp_path / "f").touch(mode=0)
    with pytest.raises(UsageProblem, match="f cannot be read: Permission denied"):
        pack_path(tmp_path / "f", "f", lambda _: None)


@pytest.mark.parametrize(
    "data", [b"not an archive" * 100, b"\0" * 100, _stream(("./f", b"x" * 5000)).getvalue()[:2000]]
)
def test_what_is_no_whole_archive_is_a_guest_error(data: bytes, place: Path) -> None:
    with pytest.raises(GuestError, match="the guest sent a broken archive"):
        unpack_as(io.BytesIO(data), place / "out")
    with pytest.raises(GuestError, match=r"broken archive|not a regular file"):
        unpack_file(io.BytesIO(data))


def test_the_content_of_a_file_is_read_and_of_nothing_else() -> None:
    assert unpack_file(_stream(("f", b"content"))) == b"content"
    for other in (None, "target"):
        with pytest.raises(GuestError, match="not a regular file") as caught:
            unpack_file(_stream(("f", other)))
        assert caught.value.hint == "use copy_out for directories"


class _Endless:
    """A stream whose first header announces more than any memory holds."""

    def __init__(self) -> None:
        member = tarfile.TarInfo("PaxHeader")
        member.type, member.size = tarfile.XHDTYPE, 1 << 40
        self._head, self.sent = member.tobuf(tarfile.GNU_FORMAT), 0

    def read(self, size: int = -1) -> bytes:
        data, self._head = self._head[:size], self._head[size:]
        self.sent += size
        return data.ljust(size, b"x")


@pytest.mark.parametrize("unpack", [lambda stream, _: unpack_file(stream), unpack_as])
def test_a_header_that_never_ends_is_given_up(unpack: Callable[[_Endless, Path], object], place: Path) -> None:
    stream = _Endless()
    with pytest.raises(GuestError, match="a header is too large"):
        unpack(stream, place / "out")
    assert stream.sent < 16 << 20
