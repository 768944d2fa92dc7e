"""Layers on disk: compressions, digests, damage, sparse files."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import subprocess
import tarfile
import threading
from pathlib import Path

import pytest
from fakes.images import compressed, directory, entry, sha256, tar_of

from pytest_fcvm.errors import HostError, ImageError
from pytest_fcvm.host import own
from pytest_fcvm.image import members
from pytest_fcvm.image.blobs import LayerBlob, spool_layer
from pytest_fcvm.image.layers import flatten
from pytest_fcvm.image.members import Limits

TAR = tar_of(directory("d"), *(entry(f"d/{number}", bytes([number]) * 5000) for number in range(200)))
needs_zstd = pytest.mark.skipif(not shutil.which("zstd"), reason="zstd is not installed")


def spooled(tmp_path, data, **known):
    path = tmp_path / "blob"
    path.write_bytes(data)
    known.setdefault("diff_id", sha256(TAR))
    with spool_layer(LayerBlob(path=path, **known), tmp_path, max_bytes=1 << 30) as file:
        file.seek(0)
        return file.read()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(TAR, id="plain"),
        pytest.param(gzip.compress(TAR), id="gzip"),
        pytest.param(gzip.compress(TAR[:70_000]) + gzip.compress(TAR[70_000:]), id="gzip-of-two-members"),
        pytest.param(gzip.compress(TAR) + bytes(1000), id="gzip-with-padding"),
        pytest.param(bz2.compress(TAR), id="bzip2"),
        pytest.param(lzma.compress(TAR), id="xz"),
    ],
)
def test_a_layer_of_every_compression_is_unpacked(tmp_path, data):
    assert spooled(tmp_path, data, digest=sha256(data)) == TAR


@needs_zstd
@pytest.mark.parametrize("skippable", [b"", b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"])
def test_a_zstd_layer_with_a_skippable_frame_is_unpacked(tmp_path, skippable):
    assert spooled(tmp_path, skippable + compressed(TAR, "zstd")) == TAR


def test_a_plain_layer_is_not_copied(tmp_path):
    path = tmp_path / "blob"
    path.write_bytes(TAR)
    with spool_layer(LayerBlob(path=path), tmp_path, max_bytes=1 << 30) as file:
        assert file.name == str(path)


@pytest.mark.parametrize("known", ["digest", "diff_id"])
def test_a_wrong_digest_is_refused(tmp_path, known):
    with pytest.raises(ImageError, match=f"damaged: its {known} is"):
        spooled(tmp_path, gzip.compress(TAR), **{known: sha256(b"something else")})


def test_an_unknown_digest_algorithm_is_refused(tmp_path):
    with pytest.raises(ImageError, match="unknown digest"):
        spooled(tmp_path, TAR, digest="md5:0")


def cut(data):
    return data[:-100]


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF, data[middle + 1] ^ 0xFF]) + data[middle + 2 :]


@pytest.mark.parametrize("how", ["gzip", pytest.param("zstd", marks=needs_zstd)])
@pytest.mark.parametrize("damage", [cut, flipped])
def test_damaged_compression_is_an_image_error(tmp_path, how, damage):
    with pytest.raises(ImageError, match="damaged"):
        spooled(tmp_path, damage(compressed(TAR, how)), diff_id="")


def test_trailing_garbage_after_gzip_is_an_error(tmp_path):
    with pytest.raises(ImageError, match="damaged"):
        spooled(tmp_path, gzip.compress(TAR) + b"garbage")


def test_a_bomb_stops_at_the_limit(tmp_path):
    path = tmp_path / "bomb"
    path.write_bytes(gzip.compress(bytes(50 << 20)))
    with pytest.raises(ImageError, match="unpacks to more than 8 MiB"):
        spool_layer(LayerBlob(path=path), tmp_path, max_bytes=8 << 20)


@needs_zstd
def test_a_bomb_in_zstd_stops_at_the_limit_and_leaves_no_process(tmp_path):
    path = tmp_path / "bomb"
    path.write_bytes(compressed(bytes(50 << 20), "zstd"))
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    before = children.read_text()
    with pytest.raises(ImageError, match="unpacks to more than 8 MiB") as caught:
        spool_layer(LayerBlob(path=path), tmp_path, max_bytes=8 << 20)
    assert children.read_text() == before
    assert caught.value  # keeps the frames of its traceback alive


@needs_zstd
def test_without_zstd_the_error_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(own.shutil, "which", lambda *_args, **_kw: None)
    with pytest.raises(HostError) as caught:
        spooled(tmp_path, compressed(TAR, "zstd"))
    assert caught.value.hint == "apt-get install zstd"


def test_the_decompressed_copy_has_no_name(tmp_path):
    path = tmp_path / "blob"
    path.write_bytes(gzip.compress(TAR))
    with spool_layer(LayerBlob(path=path), tmp_path, max_bytes=1 << 30):
        assert [entry.name for entry in tmp_path.iterdir()] == ["blob"]


def header_at(data, name):
    """Return the offset of a member's header."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return archive.getmember(name).offset


def damaged(data, offset, new):
    return data[:offset] + new + data[offset + len(new) :]


def with_checksum(data, offset, position, new):
    """Change a header and update its checksum."""
    head = bytearray(data[offset : offset + 512])
    head[position : position + len(new)] = new
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return damaged(data, offset, bytes(head))


def long_name(length):
    """Return a GNU header with a long name for the next member."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, length
    return info.tobuf(tarfile.GNU_FORMAT) + b"n" * length + bytes(-length % 512)


@pytest.mark.parametrize(
    ("broken", "match"),
    [
        pytest.param(b"no tar at all" * 100, "broken archive", id="not-a-tar"),
        pytest.param(damaged(TAR, header_at(TAR, "d/7"), b"\xff" * 100), "header is damaged", id="header"),
        pytest.param(TAR[: header_at(TAR, "d/199") + 600], "ends early", id="content-cut"),
        pytest.param(TAR[: header_at(TAR, "d/199") + 100], "broken archive|damaged", id="header-cut"),
        pytest.param(with_checksum(TAR, 0, 156, b"Z"), "unknown type", id="type"),
        pytest.param(with_checksum(TAR, header_at(TAR, "d/7"), 124, b"\xff" * 12), "is invalid", id="negative-size"),
        pytest.param(with_checksum(TAR, header_at(TAR, "d/7"), 108, b"\xff" * 8), "out of range", id="negative-uid"),
        pytest.param(
            with_checksum(TAR, header_at(TAR, "d/7"), 124, b"\x80" + b"\x7f" * 11), "is invalid", id="enormous-size"
        ),
        pytest.param(
            with_checksum(with_checksum(TAR, 0, 156, b"x"), 0, 124, b"77777777777\0"), "too large", id="pax-bomb"
        ),
        pytest.param(long_name(1000) * 9000 + TAR, "is invalid", id="a-chain-of-headers"),
        pytest.param(long_name(3 << 20) * 3 + TAR, "too large", id="large-headers-of-one-member"),
    ],
)
def test_a_broken_archive_is_an_image_error(flat, broken, match):
    with pytest.raises(ImageError, match=match):
        flat(broken)


def test_a_broken_layer_is_quoted_without_control_characters(flat):
    with pytest.raises(ImageError) as caught:
        flat(tar_of(entry("../\x1b[31mred\n")))
    assert caught.value.message.isprintable()


def gnu_sparse(tmp_path, *options):
    """Return a tar of a sparse file, made by GNU tar, and the file's content."""
    content = bytes(1 << 20) + b"A" * 5000 + bytes(3 << 20) + b"B" * 10 + bytes(1 << 20)
    directory = tmp_path / "sparse"
    directory.mkdir()
    with (directory / "file").open("wb") as file:
        for start, data in ((1 << 20, b"A" * 5000), ((4 << 20) + 5000, b"B" * 10)):
            file.seek(start)
            file.write(data)
        file.truncate(len(content))
    command = ["tar", "-C", directory, "-S", *options, "-cf", "-", "file"]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout, content


@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=posix", "--sparse-version=0.0"],
        ["--format=posix", "--sparse-version=0.1"],
        ["--format=posix", "--sparse-version=1.0"],
    ],
)
def test_sparse_files_of_every_format_are_read(flat, tmp_path, options):
    archive, content = gnu_sparse(tmp_path, *options)
    if len(archive) > 1 << 20:
        pytest.skip("this file system keeps no holes, or tar does not see them")
    result = flat(archive)
    assert result.names == ["file"]
    assert result.read("file") == content


@pytest.mark.parametrize("table", ["0,10,5,10", "90,20", "-5,10", "0,-10"])
def test_a_sparse_map_that_overlaps_or_leaves_the_file_is_refused(flat, table):
    sparse = {"GNU.sparse.size": "100", "GNU.sparse.numblocks": "2", "GNU.sparse.map": table}
    with pytest.raises(ImageError, match="is invalid"):
        flat(tar_of(entry("a", bytes(20), pax_headers=sparse)))


def test_an_archive_cannot_make_the_reader_seek_backwards(tmp_path):
    """No known header passes the other checks and seeks backwards; if one did, tarfile would loop."""
    with (tmp_path / "file").open("wb+") as file:
        guarded = members.GuardedFile(file)
        guarded.seek(512)
        with pytest.raises(tarfile.ReadError, match="points backwards"):
            guarded.seek(0)


def test_the_size_of_a_sparse_file_counts_for_the_limit(flat, tmp_path):
    archive, _ = gnu_sparse(tmp_path, "--format=gnu")
    with pytest.raises(ImageError, match="unpacks to more than"):
        flat(archive, limits=Limits(unpacked_bytes=1 << 20))


def test_an_invalid_layer_leaves_no_file(tmp_path):
    directory = tmp_path / "spool"
    directory.mkdir()
    path = tmp_path / "blob"
    path.write_bytes(gzip.compress(tar_of(entry("../x"))))
    with pytest.raises(ImageError):
        flatten([LayerBlob(path=path)], bytes, directory=directory)
    assert list(directory.iterdir()) == []
