"""Ask for manifests and copy images by `skopeo`, with its own credentials, mirrors and policies."""

from __future__ import annotations

import re
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

from pytest_fcvm.errors import HostError, ImageError
from pytest_fcvm.host.own import environment, expand_home, os
from pytest_fcvm.host.paths import run_root
from pytest_fcvm.host.process import ToolFailed, condense, ends_with_us, find_tool, resolve_tool, run_tool
from pytest_fcvm.image.archives import write_without_links
from pytest_fcvm.image.reference import ImageKind, ImageReference

__all__ = ["ask_docker", "ask_manifest", "copy_image"]

_COPY_S, _ASK_S, _LOCAL_S = 1800.0, 120.0, 20.0
_POLICIES = ("/etc/containers/policy.json", "~/.config/containers/policy.json")
_LOGINS = Path("/run/containers")
_MESSAGE = re.compile(r'msg="((?:[^"\\]|\\.)*)"')
_USERINFO = re.compile(r"(?<=://)[^/@\s\"]+@")
_SECRET_QUERY = re.compile(r"(?i)\b(token|password|secret|signature|sig)=[^&\s\"]+")
_FULL = re.compile(r"no space left on device|disk quota exceeded", re.IGNORECASE)

_AUTH = "skopeo login {tls}{registry} (or podman login, docker login) with an account that may read it"
_SPELLING = (
    "check the spelling of name and tag; skopeo list-tags {tls}docker://{repository} shows the tags that are there, "
    "and fails where there is no such name"
)
_UNREACHABLE = (
    "the registry {registry} cannot be reached from here: check network, proxy and mirrors, or name a local image as "
    "docker-archive:FILE or containers-storage:NAME"
)
# skopeo's own words, the most telling first, and what to change
_HINTS = (
    (r"no image found in (manifest list|image index) for architecture", "the image has no variant for linux/{arch}"),
    (r"toomanyrequests|too many requests", "the registry limits anonymous pulls: " + _AUTH),
    (r"unauthorized|authentication required|access to the resource is denied|status 40[13]|forbidden", _AUTH),
    (r"server gave HTTP response to HTTPS client", "set insecure = true for {registry} in registries.conf"),
    (r"x509|certificate", "put the registry's CA certificate into /etc/containers/certs.d/{registry}/ca.crt"),
    (
        r"no such host|connection refused|i/o timeout|timed? ?out|unreachable|did not end within|network is",
        _UNREACHABLE,
    ),
    (r"(manifest|name|repository name).{0,20}(unknown|not known|not found)|status 404|not found", _SPELLING),
    (r"more than one image|choose an image", "name one of them: oci:PATH:TAG, docker-archive:FILE:NAME:TAG"),
    (r"docker daemon|docker\.sock", "start Docker, or give this user the right to /var/run/docker.sock"),
    (r"does not resolve to an image|image not known", "podman images (as this user) shows the names that are there"),
    (r"no such file or directory|not a directory", "check the path"),
)


def ask_manifest(reference: ImageReference) -> bytes:
    """Return the manifest or index that the reference names now, as the registry sends it. Raise ImageError."""
    assert reference.skopeo is not None
    argv = ["inspect", "--raw", *_tls(reference, "--tls-verify=false"), reference.skopeo]
    try:
        return _skopeo(argv, timeout_s=_ASK_S).encode("utf-8", "surrogateescape")
    except ToolFailed as error:
        raise _image_error(error, reference, "amd64") from None


def ask_docker(reference: ImageReference) -> str | None:
    """Return the id of an image of Docker's, None when docker's own command cannot tell; skopeo would copy it all."""
    docker = find_tool("docker")
    if docker is None:
        return None
    try:
        return run_tool([docker, "image", "inspect", "--format", "{{.Id}}", reference.name], timeout_s=_LOCAL_S)
    except ToolFailed:
        return None


def copy_image(reference: ImageReference, directory: Path, *, arch: str) -> None:
    """Copy one platform's image into a new directory in skopeo's `dir:` layout, which keeps Docker's HEALTHCHECK.

    Raise ImageError with skopeo's reason, HostError without skopeo or when the disk is full.
    """
    assert reference.skopeo is not None
    argv = ["--override-os", "linux", "--override-arch", arch, "copy", "--quiet", "--remove-signatures"]
    argv += _tls(reference, "--src-tls-verify=false")
    try:
        try:
            _skopeo([*argv, reference.skopeo, f"dir:{directory}"], timeout_s=_COPY_S)
        except ToolFailed:
            if reference.kind is not ImageKind.DOCKER_ARCHIVE or not _copy_without_links(argv, reference, directory):
                raise
    except ToolFailed as error:
        if _FULL.search(error.stderr):
            raise HostError(
                f"no room left in {directory.parent} for the image {reference.text}",
                hint="free some disk or name another --fcvm-cache-dir",
            ) from None
        raise _image_error(error, reference, arch) from None


def _copy_without_links(argv: Sequence[str], reference: ImageReference, directory: Path) -> bool:
    """Copy from an archive in which layers are links to others, which skopeo cannot read.

    Return False when there are no links in it. Raise ToolFailed when skopeo cannot read the copy without them either.
    """
    assert reference.path is not None
    assert reference.skopeo is not None
    plain = directory.with_name("plain.tar")
    try:
        if not write_without_links(reference.path, plain):
            return False
        shutil.rmtree(directory, ignore_errors=True)
        chosen = reference.skopeo.removeprefix(f"{reference.kind}:{reference.path}")
        _skopeo([*argv, f"{reference.kind}:{plain}{chosen}", f"dir:{directory}"], timeout_s=_COPY_S)
    except (OSError, EOFError, tarfile.TarError):
        return False
    else:
        return True
    finally:
        plain.unlink(missing_ok=True)


def _skopeo(arguments: Sequence[str], *, timeout_s: float) -> str:
    skopeo = resolve_tool("skopeo", package="skopeo")
    policy = [] if any(Path(expand_home(path)).exists() for path in _POLICIES) else ["--insecure-policy"]
    return run_tool([*ends_with_us(), skopeo, *policy, *arguments], timeout_s=timeout_s, env=_environment())


def _environment(logins: Path = _LOGINS) -> dict[str, str] | None:
    """Return skopeo's environment, None for our own.

    Without a runtime directory (a session of su, a container) it looks for logins in a directory that may be root's alone,
    and fails. It is given a directory of ours then, and goes on to the user's other places for logins.
    """
    if "XDG_RUNTIME_DIR" in environment() or not logins.exists() or os.access(logins, os.X_OK):
        return None
    return {**environment(), "XDG_RUNTIME_DIR": str(run_root())}


def _tls(reference: ImageReference, option: str) -> list[str]:
    return [option] if reference.is_local_registry else []


def _image_error(error: ToolFailed, reference: ImageReference, arch: str) -> ImageError:
    reason = _reason(error)
    words = {"registry": reference.registry or "the registry", "arch": arch, "repository": reference.repository}
    words["tls"] = "".join(f"{option} " for option in _tls(reference, "--tls-verify=false"))
    hints = (hint.format(**words) for pattern, hint in _HINTS if re.search(pattern, reason, re.IGNORECASE))
    hint = next(hints, f"skopeo inspect {words['tls']}{reference.skopeo} shows more")
    if local := _find_locally(reference):
        hint = f"this machine has it: {local}. Else {hint}"
    return ImageError(
        f"image {reference.text} cannot be had: {reason}", hint=hint, evidence={"skopeo": _clean(error.stderr[-4000:])}
    )


def _reason(error: ToolFailed) -> str:
    """Return skopeo's last message on one line; it ends with the cause, so the front is what is cut."""
    messages = _MESSAGE.findall(error.stderr)
    text = re.sub(r"\\(.)", r"\1", messages[-1]) if messages else condense(error.stderr or error.message)
    return condense(_clean(" ".join(text.split())), limit=300)


def _clean(text: str) -> str:
    return _SECRET_QUERY.sub(r"\1=…", _USERINFO.sub("", text))


def _find_locally(reference: ImageReference) -> str:
    """Return how to name an image that podman or Docker has under a bare name, empty when neither does."""
    if reference.kind is not ImageKind.DOCKER or reference.text.startswith("docker:"):
        return ""
    for tool, transport in (("podman", "containers-storage"), ("docker", "docker-daemon")):
        found = find_tool(tool)
        if found is None:
            continue
        command = ("image", "inspect", "--format", "{{index .RepoTags 0}}", reference.text)
        try:
            name = run_tool([found, *command], timeout_s=_LOCAL_S).strip()
        except ToolFailed:
            continue
        if name:
            return f"{transport}:{name}"
    return ""
