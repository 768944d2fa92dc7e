"""What the host refuses is told as what it is, whatever raised it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_fcvm.errors import HostError
from pytest_fcvm.host.limits import lacks_processes, translating_emfile
from pytest_fcvm.host.threads import ServiceThread


def _error_of(number: int, filename: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), filename)


@pytest.mark.parametrize(
    ("error", "cause", "hint"),
    [
        (_error_of(errno.EMFILE), "no file descriptor is left for a clone", "ulimit -n"),
        (_error_of(errno.ENOSPC, "/run/x/log"), "no room is left for a clone", "/run/x "),
        (_error_of(errno.EDQUOT), "no room is left for a clone", "XDG_RUNTIME_DIR"),
        (_error_of(errno.EAGAIN, "/usr/bin/qemu"), "no process is left for a clone", "ulimit -u"),
        (_error_of(errno.EROFS, "/cache/x"), "Read-only file system (/cache/x)", "--fcvm-cache-dir"),
        (_error_of(errno.EIO, "/dev/x"), "a clone failed: Input/output error (/dev/x)", "fcvm doctor"),
        (RuntimeError("can't start new thread"), "no thread is left for a clone", "ulimit -u"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_an_oserror_is_reported_with_a_hint(error: Exception, cause: str, hint: str) -> None:
    with pytest.raises(HostError) as caught, translating_emfile("a clone"):
        raise error
    assert cause in caught.value.message
    assert hint in caught.value.hint
    assert "memory" not in str(caught.value).lower()


def test_another_runtime_error_is_not_reported_as_a_lack_of_threads() -> None:
    with pytest.raises(RuntimeError, match="a bug"), translating_emfile("a clone"):
        raise RuntimeError("a bug")


@pytest.mark.parametrize(
    "said",
    [
        "qemu: qemu_thread_create: Resource temporarily unavailable",
        "runtime: failed to create new OS thread (have 2 already; errno=11)",
        "BlockingIOError: [Errno 11] Resource temporarily unavailable",
        "sh: 1: Cannot fork",
    ],
)
def test_a_lack_of_processes_is_recognised_in_the_output_of_programs(said: str) -> None:
    assert lacks_processes(f"something else\n{said}\n")
    assert not lacks_processes("qemu: cannot set up guest memory: Cannot allocate memory")


def test_a_thread_that_could_not_start_is_not_joined() -> None:
    ServiceThread(lambda: None, name="never").join(5)


READ_ONLY = """
import sys
from pathlib import Path
from pytest_fcvm.host import libc
root = sys.argv[1]
libc.unshare(libc.CLONE_NEWNS)
libc.mount("/", libc.MS_REC | libc.MS_PRIVATE)
libc.mount(root, libc.MS_BIND, root)
libc.mount(root, libc.MS_REMOUNT | libc.MS_BIND | 1)
"""


@pytest.fixture
def read_only(tmp_path: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Return a function that runs code for which the directory `root` is read-only."""
    if os.geteuid():
        pytest.skip("a mount needs root")

    def run(code: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", READ_ONLY + code, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    return run


def test_a_read_only_cache_serves_its_entries(
    tmp_path: Path, read_only: Callable[[str], subprocess.CompletedProcess[str]]
) -> None:
    from pytest_fcvm.host.records import open_record
    from pytest_fcvm.store import Store

    collection = Store(tmp_path).collection("images")
    with collection.locked("there", "me", print):
        collection.build("there", lambda _directory: {"is": "known"})
    with open_record(tmp_path / "engine" / "qemu.json") as record:
        record["known"] = 1
    standby = tmp_path.parent / f"{tmp_path.name}-spare"
    standby.mkdir()
    done = read_only(f"""
from pytest_fcvm.host.records import open_record
from pytest_fcvm.errors import HostError
from pytest_fcvm.host.supervisor.janitor import sweep_temporary
from pytest_fcvm.store import Store
store = Store(Path(root))
collection = store.collection("images")
sweep_temporary(collection.path)
for key in ("there", "never-locked"):
    with collection.locked(key, "me", print) as phase:
        phase("building")
with collection.find("there").in_use():
    print(collection.find("there").facts)
with open_record(Path(root, "engine", "qemu.json")) as record:
    print(record)
    record["new"] = 2
with collection.scratch(Path({str(standby)!r})) as directory:
    (directory / "file").touch()
    print(directory.parent)
for what in (lambda: collection.build("new", lambda directory: {{}}), lambda: store.collection("kernels")):
    try:
        what()
    except HostError as error:
        print(error)
""")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["{'is': 'known'}", "{'known': 1}", str(standby)]
    assert [line for line in lines if "the cache lacks what this run needs" in line][1:]
    assert "hint: make the cache writable, or name another --fcvm-cache-dir" in lines
    assert not list(standby.iterdir())


def test_a_removed_working_directory_is_no_error(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from pytest_fcvm.host.paths import working_dir
from pytest_fcvm.image.reference import parse_reference
gone = Path(sys.argv[1], "gone")
gone.mkdir()
os.chdir(gone)
gone.rmdir()
print(parse_reference("library/nginx", base=working_dir()).skopeo)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "docker://docker.io/library/nginx:latest", done.stderr
