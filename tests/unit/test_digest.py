"""The digest of large and mostly empty files."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pytest_fcvm.store import content_digest


def test_holes_cost_nothing_and_count_like_zeros(tmp_path: Path) -> None:
    sparse, dense = tmp_path / "sparse", tmp_path / "dense"
    with sparse.open("wb") as file:
        file.truncate(64 << 30)
        file.seek(5 << 30)
        file.write(b"data")
    started = time.process_time()
    first = content_digest(sparse)
    assert time.process_time() - started < 1  # 64 GiB cannot be read in that time
    with sparse.open("r+b") as file:
        file.seek(9 << 30)
        file.write(bytes(1 << 20))  # zeros that are not a hole
        assert content_digest(sparse) == first
        file.seek(9 << 30)
        file.write(b"\1")
        file.flush()
        assert content_digest(sparse) != first
    dense.write_bytes(bytes(1 << 20))
    with sparse.open("wb") as file:
        file.truncate(1 << 20)
    assert content_digest(sparse) == content_digest(dense)


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 200_000])
def test_every_byte_and_the_length_decide_a_contents_digest(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * size)
    before = content_digest(path)
    path.write_bytes(b"a" * size + b"\0")
    assert content_digest(path) != before
    if size:
        path.write_bytes(b"a" * (size - 1) + b"b")
        assert content_digest(path) != before


def test_moved_data_is_other_data(tmp_path: Path) -> None:
    path = tmp_path / "file"
    digests = set()
    for offset in (0, 65_536, 131_072):
        path.write_bytes(bytes(offset) + b"x" + bytes(200_000 - offset))
        digests.add(content_digest(path))
    assert len(digests) == 3
