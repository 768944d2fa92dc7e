"""Get manifests and copy images with `skopeo`, which has its own credentials, mirrors and policies."""

from __future__ import annotations

import re
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

from pytest_fcvm.errors import HostError, ImageError
from pytest_fcvm.host.bundled import bundle_of
from pytest_fcvm.host.own import environment, expand_home, os
from pytest_fcvm.host.paths import run_root
from pytest_fcvm.host.process import ToolFailed, condense, find_tool, killed_with_us, resolve_tool, run_tool
from pytest_fcvm.image.archives import write_without_links
from pytest_fcvm.image.certificates import has_certificates
from pytest_fcvm.image.reference import ImageKind, ImageReference

__all__ = ["ASK_S", "ask_docker", "ask_manifest", "copy_image", "image_error", "skopeo_environment"]

_COPY_S, ASK_S, _LOCAL_S = 1800.0, 120.0, 20.0
_POLICIES = ("/etc/containers/policy.json", "~/.config/containers/policy.json")
_LOGINS = Path("/run/containers")
_MESSAGE = re.compile(r'msg="((?:[^"\\]|\\.)*)"')
_USERINFO = re.compile(r"(?<=://)[^/@\s\"]+@")
_SECRET_QUERY = re.compile(r"(?i)\b(token|password|secret|signature|sig)=[^&\s\"]+")
_FULL = re.compile(r"no space left on device|disk quota exceeded", re.IGNORECASE)

_AUTH = "skopeo login {tls}{registry} (or podman login, docker login) with an account that may read the image"
_SPELLING = (
    "check the spelling of name and tag; skopeo list-tags {tls}docker://{repository} lists the tags, and fails if "
    "there is no such name"
)
_UNREACHABLE = (
    "the registry {registry} cannot be reached from here: check network, proxy and mirrors, or name a local image as "
    "docker-archive:FILE or containers-storage:NAME"
)
_UNTRUSTED = r"x509: certificate signed by unknown authority|x509: failed to load system roots"
_NO_CERTIFICATES = "apt-get install ca-certificates, or set SSL_CERT_FILE to a file of CA certificates (PEM)"
# patterns of skopeo's messages, the most specific first, and hints
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
    (r"docker daemon|docker\.sock", "start Docker, or give this user access to /var/run/docker.sock"),
    (r"does not resolve to an image|image not known", "podman images (as this user) lists the names"),
    (r"no such file or directory|not a directory", "check the path"),
)


def ask_manifest(reference: ImageReference) -> bytes:
    """Return the current manifest or index of the reference, as the registry sends it. Raise ImageError."""
    assert reference.skopeo is not None
    argv = ["inspect", "--raw", *_tls(reference, "--tls-verify=false"), reference.skopeo]
    try:
        return _skopeo(argv, timeout_s=ASK_S).encode("utf-8", "surrogateescape")
    except ToolFailed as error:
        raise image_error(error, reference, "amd64") from None


def ask_docker(reference: ImageReference) -> str | None:
    """Return the id of an image in Docker, None if the docker command fails. skopeo would copy the whole image."""
    docker = find_tool("docker")
    if docker is None:
        return None
    try:
        return run_tool([docker, "image", "inspect", "--format", "{{.Id}}", reference.name], timeout_s=_LOCAL_S)
    except ToolFailed:
        return None


def copy_image(reference: ImageReference, directory: Path, *, arch: str) -> None:
    """Copy the image for one platform into a new directory in skopeo's `dir:` layout, which keeps HEALTHCHECK.

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
                hint="free disk space or name another --fcvm-cache-dir",
            ) from None
        raise image_error(error, reference, arch) from None


def _copy_without_links(argv: Sequence[str], reference: ImageReference, directory: Path) -> bool:
    """Copy from an archive in which layers are links to other layers, which skopeo cannot read.

    Return False if the archive has no links. Raise ToolFailed if skopeo cannot read the copy without links either.
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
    command = [*killed_with_us(), skopeo, *_policy(skopeo), *arguments]
    return run_tool(command, timeout_s=timeout_s, env=skopeo_environment())


def _policy(skopeo: Path) -> list[str]:
    """Return the options for a host without a policy: our wheel's skopeo has one beside it."""
    if any(Path(expand_home(path)).exists() for path in _POLICIES):
        return []
    beside = skopeo.with_name("policy.json")
    return ["--policy", str(beside)] if bundle_of(skopeo) and beside.exists() else ["--insecure-policy"]


def skopeo_environment(logins: Path = _LOGINS) -> dict[str, str] | None:
    """Return an environment for skopeo, or None to inherit.

    Without XDG_RUNTIME_DIR (after su, in a container) skopeo looks for logins in a directory that only root may open,
    and fails. Set the variable to a directory of this plugin, so that skopeo continues with the user's other login
    files.
    """
    if "XDG_RUNTIME_DIR" in environment() or not logins.exists() or os.access(logins, os.X_OK):
        return None
    return {**environment(), "XDG_RUNTIME_DIR": str(run_root())}


def _tls(reference: ImageReference, option: str) -> list[str]:
    return [option] if reference.is_local_registry else []


def image_error(error: ToolFailed, reference: ImageReference, arch: str) -> ImageError:
    """Return the error for a skopeo that failed, with its reason and a hint that fits the reason."""
    reason = _reason(error)
    words = {"registry": reference.registry or "the registry", "arch": arch, "repository": reference.repository}
    words["tls"] = "".join(f"{option} " for option in _tls(reference, "--tls-verify=false"))
    hints = (hint.format(**words) for pattern, hint in _HINTS if re.search(pattern, reason, re.IGNORECASE))
    hint = next(hints, f"skopeo inspect {words['tls']}{reference.skopeo} shows more")
    if re.search(_UNTRUSTED, reason) and not has_certificates():
        reason, hint = f"{reason}; this host has no CA certificates", _NO_CERTIFICATES
    if local := _find_locally(reference):
        hint = f"use the local image {local}. Else {hint}"
    return ImageError(
        f"cannot get image {reference.text}: {reason}", hint=hint, evidence={"skopeo": _clean(error.stderr[-4000:])}
    )


def _reason(error: ToolFailed) -> str:
    """Return skopeo's last message on one line. Cut its front: the cause is at the end."""
    messages = _MESSAGE.findall(error.stderr)
    text = re.sub(r"\\(.)", r"\1", messages[-1]) if messages else condense(error.stderr or error.message)
    return condense(_clean(" ".join(text.split())), limit=300)


def _clean(text: str) -> str:
    return _SECRET_QUERY.sub(r"\1=…", _USERINFO.sub("", text))


def _find_locally(reference: ImageReference) -> str:
    """Return the full reference of an image that podman or Docker has under this bare name, "" if neither has it."""
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
