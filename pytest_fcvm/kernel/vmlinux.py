"""Read a kernel file: its release, and the ELF vmlinux that Firecracker boots.

Formats: a bzImage's setup header at 0x1f1 and the payload behind the setup code (Documentation/arch/x86/boot.rst of the
kernel); an ELF vmlinux, which QEMU boots by its PVH note, has its release only in the banner.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

from pytest_fcvm.errors import HostError, UsageProblem
from pytest_fcvm.kernel.decompress import GZIP_MAGIC, unpack

__all__ = ["extract_vmlinux", "read_release", "read_vmlinux"]

_HEADER_AT = 0x202
_HEADER_MAGIC = b"HdrS"
_VERSION_AT = 0x20E  # u16, relative to 0x200
_SETUP_SECTORS_AT = 0x1F1  # u8
_PAYLOAD_AT = 0x248  # u32 offset behind the setup code, u32 length
_SECTOR = 512
_ELF_MAGIC = b"\x7fELF"
_BANNER = re.compile(rb"Linux version (\d[\x21-\x7e]*) \(")
_RELEASE = re.compile(r"\d[\x21-\x7e]*")
_HINT = "name a bzImage (a distribution's vmlinuz file) with --fcvm-kernel"


def read_release(image: Path) -> str:
    """Return a kernel's release ("6.1.0-56-cloud-amd64"). Raise UsageProblem for a file that is not a kernel."""
    data = _read(image)
    if data.startswith(_ELF_MAGIC):
        banner = _BANNER.search(data)
        text = banner[1].decode() if banner else ""
    else:
        (pointer,) = struct.unpack_from("<H", data, _VERSION_AT)
        text = data[pointer + 0x200 : pointer + 0x300].split(b"\0", 1)[0].decode("ascii", "replace") if pointer else ""
    release = _RELEASE.match(text)
    # The release becomes part of a path: refuse ".." and slashes.
    if release is None or "/" in release[0]:
        raise UsageProblem(f"{image} has no valid release", hint=_HINT)
    return release[0]


def extract_vmlinux(bzimage: Path, dest: Path) -> None:
    """Write the ELF kernel inside a bzImage, or copy a vmlinux. A failed write leaves no file.

    Raise UsageProblem for a file that is not a kernel, HostError if it cannot be decompressed here.
    """
    kernel = read_vmlinux(bzimage)
    try:
        dest.write_bytes(kernel)
    except BaseException:
        dest.unlink(missing_ok=True)
        raise


def read_vmlinux(image: Path) -> bytes:
    """Return the ELF kernel inside a bzImage, or a vmlinux unchanged. Raise the errors of `extract_vmlinux`."""
    data = _read(image)
    if data.startswith(_ELF_MAGIC):
        return data
    (setup_sectors,) = struct.unpack_from("<B", data, _SETUP_SECTORS_AT)
    offset, length = struct.unpack_from("<II", data, _PAYLOAD_AT)
    start = ((setup_sectors or 4) + 1) * _SECTOR + offset
    payload = data[start : start + length]
    if len(payload) < length or length < len(_ELF_MAGIC):
        raise UsageProblem(f"{image} is truncated", hint=_HINT)
    if not payload.startswith(GZIP_MAGIC):
        payload = payload[:-4]  # the build appends the unpacked size, except after gzip, which has it inside
    kernel = unpack(payload, what=f"the kernel in {image}")
    if not kernel.startswith(_ELF_MAGIC):
        raise HostError(f"{image} contains no ELF kernel", hint=_HINT)
    return kernel


def _read(image: Path) -> bytes:
    try:
        data = image.read_bytes()
    except OSError as error:
        raise UsageProblem(f"{image}: {error.strerror}", hint=_HINT) from error
    is_bzimage = data[_HEADER_AT : _HEADER_AT + 4] == _HEADER_MAGIC and len(data) >= _PAYLOAD_AT + 8
    if not is_bzimage and not data.startswith(_ELF_MAGIC):
        raise UsageProblem(f"{image} is not a bzImage", hint=_HINT)
    return data
