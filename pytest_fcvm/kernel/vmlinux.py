"""What is inside a bzImage: its release, and the ELF vmlinux that Firecracker boots.

Format: Documentation/arch/x86/boot.rst of the kernel (setup header at 0x1f1); the payload's magic tells its packing.
"""

from __future__ import annotations

import lzma
import struct
import subprocess
import zlib
from pathlib import Path

from pytest_fcvm.errors import HostError, UsageProblem
from pytest_fcvm.host.process import resolve_tool

__all__ = ["extract_vmlinux", "read_release"]

_HEADER_MAGIC = b"HdrS"
_LZ4_MAGIC = b"\x02\x21\x4c\x18"
_ELF = b"\x7fELF"


def read_release(image: Path) -> str:
    """Return a bzImage's kernel release ("6.1.0-56-cloud-amd64"). Raise UsageProblem for what is no bzImage."""
    data = _read_bzimage(image)
    (pointer,) = struct.unpack_from("<H", data, 0x20E)
    text = data[pointer + 0x200 : pointer + 0x300].split(b"\0", 1)[0].decode("ascii", "replace")
    if not pointer or not text:
        raise UsageProblem(f"{image} does not tell its release", hint="name a bzImage with --fcvm-kernel")
    return text.split()[0]


def extract_vmlinux(image: Path, dest: Path) -> None:
    """Write the ELF kernel that a bzImage carries. Raise HostError when the tool to unpack it is missing."""
    data = _read_bzimage(image)
    (setup_sectors,) = struct.unpack_from("<B", data, 0x1F1)
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = ((setup_sectors or 4) + 1) * 512 + offset
    kernel = _unpack(data[start : start + length])
    if not kernel.startswith(_ELF):
        raise UsageProblem(f"{image} carries no ELF kernel", hint="name another --fcvm-kernel")
    dest.write_bytes(kernel)


def _read_bzimage(image: Path) -> bytes:
    try:
        data = image.read_bytes()
    except OSError as error:
        raise UsageProblem(f"{image}: {error.strerror}", hint="name a bzImage with --fcvm-kernel") from error
    if data[0x202:0x206] != _HEADER_MAGIC:
        raise UsageProblem(f"{image} is not a bzImage", hint="name a vmlinuz file with --fcvm-kernel")
    return data


def _unpack(payload: bytes) -> bytes:
    if payload.startswith(b"\xfd7zXZ"):
        return lzma.LZMADecompressor().decompress(payload)  # the kernel's size follows the stream
    if payload.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(payload)
    if payload.startswith(_LZ4_MAGIC):
        return _pipe("lz4", payload[:-4])
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        return _pipe("zstd", payload[:-4])
    raise HostError(
        f"the kernel is packed in an unknown way (magic {payload[:4].hex()})", hint="use another --fcvm-kernel"
    )


def _pipe(tool: str, data: bytes) -> bytes:
    program = resolve_tool(tool, package=tool)
    done = subprocess.run([program, "-dc"], input=data, capture_output=True, check=False)
    if done.returncode:
        raise HostError(f"{tool} cannot unpack the kernel: {done.stderr.decode('utf-8', 'replace').strip()}")
    return done.stdout
