"""Unpack kernels and modules: gzip and xz in Python, zstd and legacy LZ4 by their commands."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable
from functools import partial
from typing import Protocol

from pytest_fcvm.errors import HostError
from pytest_fcvm.host.own import subprocess
from pytest_fcvm.host.process import condense, killed_at_deadline, resolve_tool, start_tool

__all__ = ["GZIP_MAGIC", "unpack"]

GZIP_MAGIC = b"\x1f\x8b"
_TOOL_S = 60.0


def unpack(data: bytes, *, what: str) -> bytes:
    """Decompress a stream, by its magic number. Ignore bytes after the end of a gzip or xz stream.

    Raise HostError with `what` for an unknown or broken compression, or with the package of a missing command.
    """
    for magic, unpacker in _UNPACKERS.items():
        if data.startswith(magic):
            return unpacker(data, what)
    raise HostError(f"{what} has an unknown compression (it begins with {data[:6].hex()})", hint=_HINT)


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def _library(new_decoder: Callable[[], _Decoder], broken: type[Exception]) -> Callable[[bytes, str], bytes]:
    def run(data: bytes, what: str) -> bytes:
        stream = new_decoder()
        try:
            unpacked = stream.decompress(data)
        except broken as error:
            raise _broken(what, str(error)) from error
        if not stream.eof:
            raise _broken(what, "it is truncated")
        return unpacked

    return run


def _command(tool: str) -> Callable[[bytes, str], bytes]:
    def run(data: bytes, what: str) -> bytes:
        program = resolve_tool(tool, package=tool)
        with (
            start_tool(
                [program, "-dc"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            ) as process,
            killed_at_deadline(process, _TOOL_S) as late,
        ):
            unpacked, stderr = process.communicate(data)
        if late.is_set():
            raise _broken(what, f"{tool} did not end within {_TOOL_S:.0f} s")
        if process.returncode:
            raise _broken(what, condense(stderr.decode("utf-8", "replace")))
        return unpacked

    return run


def _broken(what: str, why: str) -> HostError:
    return HostError(f"{what} cannot be unpacked: {why}", hint=_HINT)


_HINT = "name another kernel with --fcvm-kernel"
_UNPACKERS: dict[bytes, Callable[[bytes, str], bytes]] = {
    b"\xfd7zXZ\0": _library(partial(lzma.LZMADecompressor, lzma.FORMAT_XZ), lzma.LZMAError),
    GZIP_MAGIC: _library(partial(zlib.decompressobj, zlib.MAX_WBITS | 16), zlib.error),
    b"\x28\xb5\x2f\xfd": _command("zstd"),
    b"\x02\x21\x4c\x18": _command("lz4"),  # the legacy frame, which the kernel build writes
}
