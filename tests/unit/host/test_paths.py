"""Where things may lie, and who may not have put them there."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_fcvm.errors import HostError
from pytest_fcvm.host.paths import (
    LOCK_NAME,
    PATH_LIMIT,
    RunDir,
    cache_root,
    file_system_of,
    is_run_id,
    make_child_dir,
    run_root,
)


@pytest.fixture
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An $XDG_RUNTIME_DIR with a path as short as a real one."""
    path = Path(tempfile.mkdtemp(prefix="fcvm-xdg-", dir="/tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def test_the_cache_is_private_and_in_the_xdg_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_root(None) == tmp_path / "cache" / "pytest-fcvm"
    assert (tmp_path / "cache" / "pytest-fcvm").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("given", ["", "relative/directory"])
def test_without_an_absolute_xdg_directory_the_cache_is_below_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root(None) == tmp_path / ".cache" / "pytest-fcvm"


def test_an_empty_cache_directory_is_made_private_and_a_full_one_is_refused(tmp_path: Path) -> None:
    empty, full = tmp_path / "empty", tmp_path / "full"
    for directory in (empty, full):
        directory.mkdir()
        directory.chmod(0o755)
    (full / "something").touch()
    assert cache_root(empty).stat().st_mode & 0o777 == 0o700
    with pytest.raises(HostError, match="is open to other users") as caught:
        cache_root(full)
    assert f"chmod 700 {full}" in caught.value.hint
    assert full.stat().st_mode & 0o777 == 0o755, "a directory with somebody's files is never changed"


def test_a_cache_of_another_user_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        directory = tmp_path / "theirs"
        directory.mkdir(mode=0o700)
        os.chown(directory, 12345, 12345)
    else:
        directory = Path("/usr")
    with pytest.raises(HostError, match="belongs to another user") as caught:
        cache_root(directory)
    assert "--fcvm-cache-dir" in caught.value.hint


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "fuse.sshfs"])
def test_a_cache_on_a_network_file_system_is_refused(tmp_path: Path, kind: str) -> None:
    device = tmp_path.stat().st_dev
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "21 27 0:99 / /proc rw shared:14 - proc proc rw\n"
        f"99 27 {os.major(device)}:{os.minor(device)} / {tmp_path} rw,relatime shared:1 - {kind} server:/x rw\n"
    )
    with pytest.raises(HostError, match=rf"is on a network file system \({kind}\)") as caught:
        cache_root(tmp_path / "cache", mounts=mounts)
    assert "--fcvm-cache-dir" in caught.value.hint


def test_the_file_system_is_read_from_the_kernels_mount_table() -> None:
    assert file_system_of(Path("/proc")) == "proc"
    assert file_system_of(Path("/dev/shm")) == "tmpfs"


def test_a_cache_that_cannot_be_made_is_a_host_error_with_the_option(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="cannot be used: Not a directory") as caught:
        cache_root(tmp_path / "file" / "cache")
    assert "--fcvm-cache-dir" in caught.value.hint


def test_run_directories_are_in_the_runtime_directory_if_it_is_usable(runtime_dir: Path) -> None:
    assert run_root() == runtime_dir / "fcvm"
    assert (runtime_dir / "fcvm").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("bad", ["missing", "too long", "relative", "symlink", "open"])
def test_tmp_replaces_an_unusable_runtime_directory(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bad: str
) -> None:
    made = runtime_dir / ("x" * 40)
    made.mkdir()
    (runtime_dir / "s").mkdir()
    (runtime_dir / "s" / "fcvm").symlink_to(made)
    (runtime_dir / "o" / "fcvm").mkdir(parents=True)
    (runtime_dir / "o" / "fcvm").chmod(0o777)
    values = {
        "missing": runtime_dir / "none",
        "too long": made,
        "relative": Path("run"),
        "symlink": runtime_dir / "s",
        "open": runtime_dir / "o",
    }
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(values[bad]))
    assert run_root(tmp_path) == tmp_path / f"fcvm-{os.geteuid()}"
    assert list(made.iterdir()) == []


@pytest.mark.parametrize("attack", ["symlink", "file", "open to all", "of another user"])
def test_a_run_root_that_is_not_a_private_directory_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, attack: str
) -> None:
    if attack == "of another user" and os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    tmp, elsewhere = tmp_path / "tmp", tmp_path / "elsewhere"
    tmp.mkdir()
    elsewhere.mkdir(mode=0o700)  # fit in every way but that it is not where it seems to be
    place = tmp / f"fcvm-{os.geteuid()}"
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    _put_in_place(place, attack, elsewhere)
    with pytest.raises(HostError, match=f"{place} is not a private directory of this user") as caught:
        run_root(tmp)
    assert f"remove {place}" in caught.value.hint
    assert list(elsewhere.iterdir()) == []


def _put_in_place(place: Path, attack: str, elsewhere: Path) -> None:
    if attack == "symlink":
        place.symlink_to(elsewhere)
    elif attack == "file":
        place.touch(mode=0o600)
    else:
        place.mkdir()
        place.chmod(0o777 if attack == "open to all" else 0o700)
        if attack == "of another user":
            os.chown(place, 12345, 12345)


def test_a_run_directory_is_private_and_locked_and_removed_at_the_end(run_root: Path) -> None:
    with RunDir(run_root) as run:
        assert run.path.parent == run_root
        assert is_run_id(run.path.name)
        assert run.path.stat().st_mode & 0o777 == 0o700
        (run.path / "clone" / "deep").mkdir(parents=True)
        with (run.path / LOCK_NAME).open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path = run.path
    assert not path.exists()
    run.__exit__(None, None, None)


def test_a_run_directory_that_the_guard_has_removed_is_no_error(run_root: Path) -> None:
    with RunDir(run_root) as run:
        shutil.rmtree(run.path)


def test_a_removed_run_root_is_a_host_error(run_root: Path) -> None:
    with pytest.raises(HostError, match="is gone"):
        RunDir(run_root / "none").__enter__()


def test_our_longest_path_fits_a_unix_socket(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = runtime_dir / ("x" * (45 - len(str(runtime_dir)) - len("/fcvm") - 1))
    longest.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(longest))
    root = run_root()
    assert root.parent == longest
    with RunDir(root) as run:
        child = make_child_dir(run.path, "a-name-that-goes-on-and-on-and-on", 99_999)
        assert len(str(child / "a-socket.sock")) < PATH_LIMIT
