"""Files in and out of real guests: paths, links, owners, special files, and what a mapped path hides."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pytest_fcvm import Clone, CloneFactory, GuestError

pytestmark = pytest.mark.fcvm(command=["sleep", "infinity"], ready="agent")


def test_a_file_is_copied_into_an_existing_directory_also_through_links(fcvm_clone: Clone, tmp_path: Path) -> None:
    (tmp_path / "real.sql").write_text("rows")
    (tmp_path / "schema.sql").symlink_to("real.sql")
    for place in ("/tmp", "/var/run", "/bin"):
        fcvm_clone.copy_in(tmp_path / "schema.sql", place)
        assert fcvm_clone.read_text(f"{place}/schema.sql") == "rows"
    seen = fcvm_clone.succeed("stat -c '%F %a' /tmp; readlink /var/run /bin").split("\n")
    assert seen[:3] == ["directory 1777", "/run", "usr/bin"]


def test_the_owner_of_a_copied_file_can_be_chosen(fcvm_clone: Clone, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    (tmp_path / "key").chmod(0o600)
    fcvm_clone.copy_in(tmp_path / "key", "/srv/root")
    fcvm_clone.copy_in(tmp_path / "key", "/srv/www", owner="www-data")
    fcvm_clone.copy_in(tmp_path / "key", "/srv/number", owner="1234:5678")
    fcvm_clone.copy_in(tmp_path / "key", "/srv/host", owner=None)
    fcvm_clone.write_text("/srv/text", "secret", owner="www-data:games")
    seen = fcvm_clone.succeed("cd /srv; stat -c '%U:%G' root www text; stat -c '%u:%g' number host").split()
    assert seen == ["root:root", "www-data:www-data", "www-data:games", "1234:5678", f"{os.getuid()}:{os.getgid()}"]
    assert fcvm_clone.exec("cat /srv/www", user="www-data").stdout == "secret"
    with pytest.raises(GuestError, match="user nobody-here is not in the image's /etc/passwd"):
        fcvm_clone.copy_in(tmp_path / "key", "/srv/", owner="nobody-here")


def test_special_files_and_links_do_not_prevent_copying_a_directory_out(fcvm_clone: Clone, tmp_path: Path) -> None:
    fcvm_clone.succeed(
        "mkdir -p /srv/d/empty; cd /srv/d; mkfifo pipe; mknod null c 1 3; echo text > file; ln file twin;"
        "ln -s /dev/stdout out; ln -s ../../var/log up; ln -s file here; touch -d @1000000000 file empty;"
        "perl -MIO::Socket::UNIX -e 'IO::Socket::UNIX->new(Local => \"sock\", Listen => 1)'; chmod 4755 file"
    )
    fcvm_clone.copy_out("/srv/d", tmp_path / "made/d")
    out = tmp_path / "made/d"
    assert {path.name for path in out.iterdir()} == {"empty", "file", "twin", "out", "up", "here"}
    assert [(out / name).readlink() for name in ("out", "up", "here")] == [
        Path("/dev/stdout"),
        Path("../../var/log"),
        Path("file"),
    ]
    status = (out / "file").stat()
    assert (status.st_nlink, status.st_mtime, status.st_mode & 0o7777) == (2, 1_000_000_000, 0o755)
    assert (out / "empty").stat().st_mtime == 1_000_000_000
    fcvm_clone.copy_in(out, "/srv/back")
    assert fcvm_clone.succeed("cd /srv/back; readlink out up; stat -c '%h %Y' file; stat -c %Y empty").split() == [
        "/dev/stdout",
        "../../var/log",
        "2",
        "1000000000",
        "1000000000",
    ]


def test_a_mapped_path_hides_the_images_files_and_keeps_owners(
    fcvm_clone_factory: CloneFactory, tmp_path: Path
) -> None:
    (tmp_path / "conf").mkdir(mode=0o750)
    (tmp_path / "conf/mine.conf").write_text("mine\n")
    (tmp_path / "link").symlink_to("conf")
    (tmp_path / "inner").write_text("inner\n")
    uid = 1234 if os.geteuid() == 0 else os.getuid()
    for path in (tmp_path / "conf", tmp_path / "conf/mine.conf"):
        os.chown(path, uid, -1)
    clone = fcvm_clone_factory(
        map=[
            f"{tmp_path}/inner:/etc/apt/deep/inner",
            f"{tmp_path}/link:/etc/apt",
            f"{tmp_path}/conf:/srv/www:ro,owner=www-data",
            f"{tmp_path}/inner:/etc/issue",
        ],
        command=["sleep", "infinity"],
        ready="agent",
    )
    assert clone.succeed("ls -A /etc/apt; cat /etc/apt/deep/inner /etc/issue").split() == [
        "deep",
        "mine.conf",
        "inner",
        "inner",
    ]
    assert clone.succeed("stat -c '%u %a' /etc/apt /etc/apt/mine.conf").split()[:3] == [str(uid), "750", str(uid)]
    assert clone.succeed("stat -c '%U %a' /srv/www").split() == ["www-data", "550"]
    (fork,) = clone.fork()
    fork.copy_in(tmp_path / "inner", "/etc/apt")
    assert fork.succeed("ls -A /etc/apt").split() == ["deep", "inner", "mine.conf"]
    with pytest.raises(GuestError, match="put a file in the place of /etc/apt: Is a directory"):
        fcvm_clone_factory(map=[f"{tmp_path}/inner:/etc/apt"], command=["sleep", "infinity"], ready="agent")
