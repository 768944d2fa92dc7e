"""Tar streams to and from a guest. What comes from a guest is hostile until it has proven otherwise."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_fcvm.errors import GuestError, UsageProblem
from pytest_fcvm.host.archive import pack_path, pack_text, unpack_as, unpack_file

_Make = Callable[[tarfile.TarFile], None]


def _stream(*members: tuple[str, bytes | str | None]) -> io.BytesIO:
    """Make an archive: bytes are files, text is the target of a link (`=` in front: a hard one), None is a folder."""
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


pytestmark = pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")


@pytest.fixture(params=["filter of tarfile", "without it"], autouse=True)
def _filter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpack as every Python does, and as those before 3.11.4 do."""
    if request.param == "without it":
        monkeypatch.delattr(tarfile, "data_filter", raising=False)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with something beside what is unpacked, and outside of it."""
    place = tmp_path / "place"
    place.mkdir()
    (place / "precious").write_text("mine")
    (tmp_path / "precious").write_text("mine")
    return place


def test_a_folder_is_sent_whole_and_as_root(tmp_path: Path) -> None:
    source = tmp_path / "conf"
    (source / "sub").mkdir(parents=True)
    (source / "sub/script").write_text("#!")
    (source / "sub/script").chmod(0o755)
    (source / "link").symlink_to("sub/script")
    os.link(source / "sub/script", source / "twin")
    os.chown(source / "sub", os.getuid(), os.getgid())
    archive = _packed(lambda send: pack_path(source, "etc", send))
    assert sorted(archive.getnames()) == ["etc", "etc/link", "etc/sub", "etc/sub/script", "etc/twin"]
    assert {(member.uid, member.gid, member.uname, member.gname) for member in archive} == {(0, 0, "root", "root")}
    script = archive.getmember("etc/sub/script")
    assert script.mode & 0o777 == 0o755
    read_only = _packed(lambda send: pack_path(source, "etc", send, read_only=True))
    assert read_only.getmember("etc/sub/script").mode & 0o777 == 0o555


def test_a_source_that_is_not_there_is_a_usage_problem(tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match="gone does not exist") as caught:
        pack_path(tmp_path / "gone", "x", print)
    assert caught.value.hint == "copy_in takes an existing file or folder"


def test_text_is_sent_with_its_mode() -> None:
    archive = _packed(lambda send: pack_text("grün".encode(), "f", 0o600, send))
    (member,) = archive.getmembers()
    content = archive.extractfile(member)
    assert content is not None
    assert (member.name, member.mode, content.read().decode()) == ("f", 0o600, "grün")


def test_a_folder_comes_out_under_the_name_it_is_given(place: Path) -> None:
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
        [("./", None), ("./x", "../precious"), ("./x", b"yours")],
        [("./", None), ("./x", ".."), ("./x/precious", b"yours")],
        [("./", None), ("./x", "=../precious"), ("./x", b"yours")],
        [("./", None), ("./x", "/etc")],
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


def test_devices_are_refused(place: Path) -> None:
    member = tarfile.TarInfo("./null")
    member.type, member.devmajor, member.devminor = tarfile.CHRTYPE, 1, 3
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(member)
    packed.seek(0)
    with pytest.raises(GuestError, match="unsafe archive member"):
        unpack_as(packed, place / "out")


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
        assert caught.value.hint == "use copy_out for folders"
