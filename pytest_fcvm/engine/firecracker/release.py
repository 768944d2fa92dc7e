"""Install a release of Firecracker: download the project's archive, verify it, unpack it, and try the program.

The SHA-256 of an archive is in a file beside it: `firecracker-v1.16.1-x86_64.tgz` and `….tgz.sha256.txt`. The archive
holds `release-v1.16.1-x86_64/firecracker-v1.16.1-x86_64`, and the jailer by the same pattern.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from pathlib import Path

import httpx

from pytest_fcvm.engine.firecracker.installation import PROGRAM, tools_dir
from pytest_fcvm.engine.firecracker.version import FirecrackerVersion, parse_version, refuse_broken
from pytest_fcvm.errors import FcvmError, HostError, UsageProblem
from pytest_fcvm.host.process import run_tool
from pytest_fcvm.model.results import Progress

__all__ = ["BASE_URL", "LATEST", "install_release"]

BASE_URL = "https://github.com/firecracker-microvm/firecracker/releases/download"
LATEST = "1.16.1"
"""The newest version that this engine was tried with."""

_ARCHITECTURE = "x86_64"
_PROGRAMS = (PROGRAM, "jailer")
_TIMEOUT_S = 30.0  # without a byte
_TRY_S = 30.0
_STEP_PERCENT = 10  # between two lines of progress
_MIRROR_HINT = "name a mirror of the releases with --base-url, or the program itself with --fcvm-firecracker"


def install_release(text: str, cache_dir: Path, progress: Progress, base_url: str = BASE_URL) -> Path:
    """Install a version of Firecracker and its jailer, and return the path of Firecracker.

    Resume a download that was cut off. Raise UsageProblem for text that is not a version, HostError for a release that
    is missing, incomplete, or does not run on this host. A program that was installed before stays then.
    """
    version = parse_version(text)
    if version is None:
        raise UsageProblem(f"{text!r} is not a version", hint=f"--version {LATEST}")
    refuse_broken(version)
    directory = tools_dir(cache_dir)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    name = f"firecracker-v{version}-{_ARCHITECTURE}.tgz"
    url = f"{base_url.rstrip('/')}/v{version}/{name}"
    archive = directory / f"{name}.part"
    with httpx.Client(timeout=_TIMEOUT_S, follow_redirects=True) as client:
        digest = _fetch_digest(client, f"{url}.sha256.txt")
        _fetch(client, url, archive, progress)
    progress("verifying the archive")
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        archive.unlink()
        raise HostError(f"{url} has the SHA-256 {found} and not {digest}", hint=f"try again, or {_MIRROR_HINT}")
    _unpack(archive, version, directory)
    archive.unlink()
    return directory / PROGRAM


def _fetch_digest(client: httpx.Client, url: str) -> str:
    try:
        answer = client.get(url)
    except httpx.HTTPError as error:
        raise _unreachable(url, error) from error
    if answer.is_error:
        raise _refused(url, answer.status_code)
    found = re.match(r"[0-9a-f]{64}\b", answer.text.strip())
    if found is None:
        raise HostError(f"{url} is not a SHA-256: {answer.text[:80]!r}", hint=_MIRROR_HINT)
    return found[0]


def _fetch(client: httpx.Client, url: str, archive: Path, progress: Progress) -> None:
    """Download the missing part of an archive."""
    have = archive.stat().st_size if archive.exists() else 0
    try:
        with client.stream("GET", url, headers={"Range": f"bytes={have}-"} if have else {}) as answer:
            if answer.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                return  # nothing is missing; the digest shows whether the archive is good
            if answer.is_error:
                raise _refused(url, answer.status_code)
            resumes = answer.status_code == httpx.codes.PARTIAL_CONTENT
            done = have if resumes else 0
            progress(f"{'fetching the rest of' if resumes else 'fetching'} {url}")
            _save(answer, archive, done, progress)
    except httpx.HTTPError as error:
        raise _unreachable(url, error) from error


def _save(answer: httpx.Response, archive: Path, done: int, progress: Progress) -> None:
    total = done + int(answer.headers.get("Content-Length", 0))
    shown = 0
    with archive.open("ab" if done else "wb") as file:
        for chunk in answer.iter_raw():
            file.write(chunk)
            done += len(chunk)
            percent = 100 * done // total if total else 0
            if percent >= shown + _STEP_PERCENT:
                shown = percent
                progress(f"{percent} % of {total >> 20} MiB")


def _unpack(archive: Path, version: FirecrackerVersion, directory: Path) -> None:
    """Put the programs into the directory. Run the new Firecracker before replacing an old one."""
    unpacked = []
    try:
        with tarfile.open(archive, "r:gz") as release:
            for name in _PROGRAMS:
                inside = f"release-v{version}-{_ARCHITECTURE}/{name}-v{version}-{_ARCHITECTURE}"
                file = release.extractfile(inside)
                if file is None:
                    raise KeyError(inside)
                unpacked.append(directory / f"{name}.new")
                unpacked[-1].write_bytes(file.read())
                unpacked[-1].chmod(0o755)
        _try(unpacked[0], version)
        for program in unpacked:
            program.replace(program.with_suffix(""))
    except (tarfile.TarError, KeyError, EOFError) as error:
        raise HostError(f"{archive.name} is not a release of Firecracker: {error}", hint=_MIRROR_HINT) from error
    finally:
        for program in unpacked:
            program.unlink(missing_ok=True)


def _try(program: Path, version: FirecrackerVersion) -> None:
    try:
        output = run_tool([program, "--version"], timeout_s=_TRY_S)
    except FcvmError as error:
        raise HostError(f"the Firecracker of the release does not run on this host: {error.message}") from error
    if parse_version(output) != version:
        raise HostError(f"the Firecracker of the release reports {output.strip()[:80]!r}", hint=_MIRROR_HINT)


def _refused(url: str, status: int) -> HostError:
    if status == httpx.codes.NOT_FOUND:
        return HostError(f"there is no {url}", hint=f"choose another version; --version {LATEST} is known to work")
    return HostError(f"{url}: the server answered HTTP {status}", hint=_MIRROR_HINT)


def _unreachable(url: str, error: httpx.HTTPError) -> HostError:
    reason = str(error) or type(error).__name__
    return HostError(f"{url}: {reason}", hint=f"try again, the downloaded part is kept; or {_MIRROR_HINT}")
