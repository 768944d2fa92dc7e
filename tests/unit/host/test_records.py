from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_fcvm.errors import HostError
from pytest_fcvm.host.files import stamp_of
from pytest_fcvm.host.records import Digests, open_record

COUNT_UP = """
import sys
from pathlib import Path
from pytest_fcvm.host.records import open_record
for _ in range(50):
    with open_record(Path(sys.argv[1])) as record:
        record["n"] = record.get("n", 0) + 1
"""


def test_concurrent_writers_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new directory" / "record.json"
    writers = [subprocess.Popen([sys.executable, "-c", COUNT_UP, str(path)]) for _ in range(4)]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    with open_record(path) as record:
        assert record == {"n": 200}


def test_a_record_that_was_only_read_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    with open_record(path) as record:
        record["a"] = 1
    before = stamp_of(path)
    with open_record(path) as record:
        assert record["a"] == 1
    assert stamp_of(path) == before


def test_a_failure_inside_leaves_the_record_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    with pytest.raises(ZeroDivisionError), open_record(path) as record:
        record["a"] = 1 / 0 if record.setdefault("b", 1) else 2
    with open_record(path) as record:
        assert record == {}


def test_a_directory_that_cannot_be_made_is_a_host_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="cannot be made"), open_record(tmp_path / "file" / "record.json"):
        pass


def test_a_digest_is_computed_again_only_when_the_file_changes(tmp_path: Path) -> None:
    path, record = tmp_path / "binary", {}  # type: ignore[var-annotated]
    path.write_bytes(b"one")
    first = Digests(record).of(path)
    record[str(path)][1] = "from the record"
    assert Digests(record).of(path) == "from the record"
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))  # a changed content with an old time is still another file
    assert Digests(record).of(path) not in (first, "from the record")


def test_a_file_that_cannot_be_read_is_a_host_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot be read: No such file"):
        Digests({}).of(tmp_path / "missing")
