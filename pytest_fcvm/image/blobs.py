"""Layers as plain tar files on disk: decompress a layer once, and verify its digests meanwhile."""

from __future__ import annotations

import bz2
import hashlib
import lzma
import tempfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from pytest_fcvm.errors import ImageError
from pytest_fcvm.host.own import subprocess
from pytest_fcvm.host.process import condense, resolve_tool, start_tool

__all__ = ["LayerBlob", "spool_layer"]

_CHUNK = 1 << 20
_GZIP, _ZSTD, _BZIP2, _XZ = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ\x00"
_SKIPPABLE = tuple(bytes([0x50 + number]) + b"\x2a\x4d\x18" for number in range(16))  # zstd: skippable frames


@dataclass(frozen=True, kw_only=True)
class LayerBlob:
    """The file of a layer. Digests have the form "sha256:HEX"; an empty one is not verified."""

    path: Path
    digest: str = ""
    diff_id: str = ""


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    @property
    def needs_input(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int = ..., /) -> bytes: ...


def spool_layer(blob: LayerBlob, directory: Path, *, max_bytes: int) -> IO[bytes]:
    """Return the layer's tar as an open, seekable file: the blob, or an unnamed decompressed copy in `directory`.

    Raise ImageError for a wrong digest, a broken stream or more than `max_bytes`; OSError when the disk is full.
    """
    with blob.path.open("rb") as head:
        magic = head.read(8)
    compressed = not _is_plain(magic)
    copy = tempfile.TemporaryFile(dir=directory) if compressed else None  # noqa: SIM115  returned open
    try:
        whole, plain = _new_hash(blob.digest), _new_hash(blob.diff_id)
        with closing(_plain_chunks(blob.path, magic, whole.update)) as chunks:
            for chunk in _limited(chunks, max_bytes):
                plain.update(chunk)
                if copy is not None:
                    copy.write(chunk)
        _verify("digest", blob.digest, whole.hexdigest())
        _verify("diff_id", blob.diff_id, plain.hexdigest())
    except BaseException:
        if copy is not None:
            copy.close()
        raise
    if copy is None:
        return blob.path.open("rb")
    copy.flush()
    return copy


def _limited(chunks: Iterable[bytes], max_bytes: int) -> Iterator[bytes]:
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > max_bytes:
            raise ImageError(
                f"a layer of the image unpacks to more than {max_bytes >> 20} MiB", hint="use a smaller image"
            )
        yield chunk


def _is_plain(magic: bytes) -> bool:
    return not (magic.startswith((_GZIP, _ZSTD, _BZIP2, _XZ)) or magic[:4] in _SKIPPABLE)


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


class _NoHash:
    """A hash that computes nothing, for a layer without a known digest."""

    def update(self, data: bytes, /) -> None:
        pass

    def hexdigest(self) -> str:
        return ""


def _new_hash(expected: str) -> _Hash:
    algorithm = expected.partition(":")[0]
    if not expected:
        return _NoHash()
    if algorithm not in ("sha256", "sha384", "sha512"):
        raise ImageError(f"the image uses an unknown digest algorithm: {algorithm[:20]!r}", hint="rebuild the image")
    return hashlib.new(algorithm)


def _verify(what: str, expected: str, found: str) -> None:
    if expected and expected.partition(":")[2] != found:
        raise ImageError(
            f"a layer of the image is damaged: its {what} is {found[:12]}…, not {expected.partition(':')[2][:12]}…",
            hint="pull the image again (--fcvm-pull always) or rebuild it",
        )


def _plain_chunks(path: Path, magic: bytes, on_read: Callable[[bytes], None]) -> Generator[bytes]:
    """Yield the decompressed content in pieces. Call `on_read` with the bytes of the file."""
    if magic.startswith(_GZIP):
        yield from _inflate(path, on_read, _Gzip)
    elif magic.startswith(_BZIP2):
        yield from _inflate(path, on_read, bz2.BZ2Decompressor)
    elif magic.startswith(_XZ):
        yield from _inflate(path, on_read, lzma.LZMADecompressor)
    elif _is_plain(magic):
        for chunk in _read(path):
            on_read(chunk)
            yield chunk
    else:
        yield from _unzstd(path, on_read)


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            yield chunk


class _Gzip:
    """zlib's decoder with the interface of bz2's and lzma's."""

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._decoder.unconsumed_tail

    def decompress(self, data: bytes, max_length: int = -1, /) -> bytes:
        return self._decoder.decompress(self._decoder.unconsumed_tail + data, max(0, max_length))


def _inflate(path: Path, on_read: Callable[[bytes], None], new_decoder: Callable[[], _Decoder]) -> Iterator[bytes]:
    """Decompress consecutive members (pigz and estargz write many). Ignore zero padding after the last."""
    decoder = new_decoder()
    try:
        for data in _read(path):
            on_read(data)
            while True:
                if decoder.eof:
                    data = (decoder.unused_data + data).lstrip(b"\0")
                    if not data:
                        break
                    decoder = new_decoder()
                if chunk := decoder.decompress(data, _CHUNK):
                    yield chunk
                data = b""
                if decoder.needs_input and not decoder.eof:
                    break
    except (zlib.error, lzma.LZMAError, OSError, EOFError) as error:
        raise _damaged(str(error)) from error
    if not decoder.eof:
        raise _damaged("its compressed data ends early")


def _unzstd(path: Path, on_read: Callable[[bytes], None]) -> Iterator[bytes]:
    for chunk in _read(path):
        on_read(chunk)
    command = [str(resolve_tool("zstd", package="zstd")), "-dcq", "--", str(path)]
    with start_tool(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:  # its exit closes the pipes first, so that SIGPIPE ends zstd if this generator is closed early
        assert process.stdout is not None
        assert process.stderr is not None
        while chunk := process.stdout.read(_CHUNK):
            yield chunk
        final_output = process.stderr.read(64 * 1024).decode("utf-8", "replace")
        if process.wait():
            raise _damaged(condense(final_output))


def _damaged(reason: str) -> ImageError:
    return ImageError(
        f"a layer of the image is damaged: {reason}", hint="pull the image again (--fcvm-pull always) or rebuild it"
    )
