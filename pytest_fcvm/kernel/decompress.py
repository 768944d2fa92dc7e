"""Unpack kernels and modules: gzip and xz in Python, zstd and legacy LZ4 by their commands."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable

from pytest_fcvm.errors import HostError
from pytest_fcvm.host.own import subprocess
from pytest_fcvm.host.process import condense, killed_at_deadline, resolve_tool, start_tool

__all__ = ["GZIP_MAGIC", "unpack"]

GZIP_MAGIC = b"\x1f\x8b"
_TOOL_S = 60.0


def unpack(data: bytes, *, what: str) -> bytes:
    """Return what a stream holds, told by its magic; bytes after the end of a gzip or xz stream do not matter.

    Raise HostError naming `what` for an unknown or broken packing, or the package of a command that is not installed.
    """
    for magic, unpacker in _UNPACKERS.items():
        if data.startswith(magic):
            return unpacker(data, what)
    raise HostError(f"{what} is packed in an unknown way (it begins with {data[:6].hex()})", hint=_HINT)


def _gzip(data: bytes, what: str) -> bytes:
    stream = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        unpacked = stream.decompress(data)
    except zlib.error as error:
        raise _broken(what, str(error)) from error
    if not stream.eof:
        raise _broken(what, "it ends too early")
    return unpacked


def _xz(data: bytes, what: str) -> bytes:
    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)
    try:
        unpacked = stream.decompress(data)
    except lzma.LZMAError as error:
        raise _broken(what, str(error)) from error
    if not stream.eof:
        raise _broken(what, "it ends too early")
    return unpacked


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
    b"\xfd7zXZ\0": _xz,
    GZIP_MAGIC: _gzip,
    b"\x28\xb5\x2f\xfd": _command("zstd"),
    b"\x02\x21\x4c\x18": _command("lz4"),  # the legacy frame, in which the kernel's build packs
}
