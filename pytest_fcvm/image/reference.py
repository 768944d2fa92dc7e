"""Image references: skopeo's transports, bare names as in Docker, and a rootfs as a tar or a directory."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pytest_fcvm.errors import UsageProblem
from pytest_fcvm.host.own import expand_home

__all__ = ["ImageKind", "ImageReference", "parse_reference"]


class ImageKind(StrEnum):
    """Where an image is stored. All values but the last two are skopeo's transports."""

    DOCKER = "docker"
    OCI = "oci"
    OCI_ARCHIVE = "oci-archive"
    DOCKER_ARCHIVE = "docker-archive"
    DIR = "dir"
    CONTAINERS_STORAGE = "containers-storage"
    DOCKER_DAEMON = "docker-daemon"
    ROOTFS_TAR = "rootfs-tar"
    ROOTFS_DIR = "rootfs-dir"

    @property
    def is_rootfs(self) -> bool:
        """Say whether the image is a plain file system without a configuration."""
        return self in (ImageKind.ROOTFS_TAR, ImageKind.ROOTFS_DIR)

    @property
    def is_remote(self) -> bool:
        """Say whether the image is in a registry."""
        return self is ImageKind.DOCKER

    @property
    def has_path(self) -> bool:
        """Say whether the reference names a file or a directory of this host."""
        return self in _WITH_PATH or self.is_rootfs


@dataclass(frozen=True, kw_only=True)
class ImageReference:
    """One image. `text` is what the user wrote; `skopeo` is skopeo's reference, None for a plain rootfs.

    `path` is the absolute path of a local image, `registry` the host[:port] of a remote one.
    """

    text: str
    kind: ImageKind
    skopeo: str | None
    path: Path | None = None
    registry: str = ""

    @property
    def name(self) -> str:
        """Return the reference without its transport."""
        return self.skopeo.partition(":")[2].removeprefix("//") if self.skopeo else str(self.path)

    @property
    def source(self) -> str:
        """Return the canonical spelling of the reference."""
        return self.skopeo or f"{self.kind}:{self.path}"

    @property
    def is_local_registry(self) -> bool:
        """Say whether the registry is on this host's loopback, where TLS is not expected."""
        host = self.registry.rpartition(":")[0] if _PORT.search(self.registry) else self.registry
        try:
            return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
        except ValueError:
            return False

    @property
    def pinned_digest(self) -> str:
        """Return the manifest digest in the reference, "" for a tag, which may move."""
        return self.name.partition("@")[2] if self.kind.is_remote else ""

    def at_digest(self, digest: str) -> ImageReference:
        """Return a reference to this manifest digest in the same repository; a local reference itself."""
        if not self.kind.is_remote:
            return self
        return ImageReference(
            text=self.text, kind=self.kind, skopeo=f"docker://{self.repository}@{digest}", registry=self.registry
        )

    @property
    def repository(self) -> str:
        """Return the name without tag and digest, as for listing tags."""
        return _TAG.sub("", self.name.partition("@")[0])


_WITH_PATH = (ImageKind.OCI, ImageKind.OCI_ARCHIVE, ImageKind.DOCKER_ARCHIVE, ImageKind.DIR)
_ROOTFS_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_USERINFO = re.compile(r"[^/@\s]+:[^/@]*@(?!sha\d+:)")
_PORT = re.compile(r":\d+$")
_TAG = re.compile(r":[\w.-]+$", re.ASCII)
_PATH_START = re.compile(r"(/|\./|\.\./|~/)|\.{1,2}$")
# The grammar of distribution/reference: repository components, then an optional tag and an optional digest.
_NAME = re.compile(
    r"(?P<repository>[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*)"
    r"(?::(?P<tag>\w[\w.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}))?",
    re.ASCII,
)
_REGISTRY = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::\d{1,5})?")
_REGISTRY_NAME = re.compile(rf"(?:{_REGISTRY.pattern}/)?{_NAME.pattern}", re.ASCII)
_FORMS = (
    "write nginx:latest, registry:5000/name:tag, oci:PATH:TAG, docker-archive:PATH, containers-storage:NAME, "
    "rootfs.tar or ./directory"
)


def parse_reference(text: str, *, base: Path) -> ImageReference:
    """Parse an image reference. Relative paths start at `base`.

    A bare name is on docker.io, as in Docker. These are directories: an absolute path, a path with a leading `./`,
    `../` or `~/`, and an existing relative path with a slash. Raise UsageProblem, whose text never has a password.
    """
    _refuse_hostile(text)
    scheme, colon, rest = text.partition(":")
    if colon and scheme in list(ImageKind) and not ImageKind(scheme).is_rootfs:
        return _with_transport(text, ImageKind(scheme), rest, base)
    found = _find_rootfs(text, base)
    return found or _docker(text, text)


def _refuse_hostile(text: str) -> None:
    if not text.strip():
        raise UsageProblem("the image's name is empty", hint=_FORMS)
    meant = text.strip().removeprefix("http://").removeprefix("https://")
    if meant != text and _REGISTRY_NAME.fullmatch(meant):
        raise UsageProblem(f"{text!r} is not an image's name", hint=f"write {meant}")
    if text.startswith("-") or text != text.strip() or _CONTROL.search(text):
        raise UsageProblem(f"{_shown(text)!r} is not an image's name", hint=_FORMS)


def _with_transport(text: str, kind: ImageKind, rest: str, base: Path) -> ImageReference:
    if kind is ImageKind.DOCKER:
        if not rest.startswith("//"):
            raise UsageProblem(f"{_shown(text)!r} lacks two slashes", hint=f"write docker://{_shown(rest)}")
        return _docker(text, rest[2:])
    if not rest or rest.startswith("-"):
        raise UsageProblem(f"{_shown(text)!r} names no image", hint=_FORMS)
    if kind not in _WITH_PATH:
        if " " in rest and not rest.startswith("["):  # the path of podman's storage may have a space
            raise UsageProblem(f"{_shown(text)!r} has a space", hint=_FORMS)
        return ImageReference(text=text, kind=kind, skopeo=f"{kind}:{rest}")
    name, colon, tag = (rest, "", "") if kind is ImageKind.DIR else rest.partition(":")
    path = _absolute(name, base)
    if ":" in str(path) and kind is not ImageKind.DIR:
        raise UsageProblem(
            f"{path} has a colon, which ends the path in {kind}: references", hint="use a path without a colon"
        )
    return ImageReference(text=text, kind=kind, skopeo=f"{kind}:{path}{colon}{tag}", path=path)


def _find_rootfs(text: str, base: Path) -> ImageReference | None:
    path = _absolute(text, base)
    explicit = bool(_PATH_START.match(text))
    if text.endswith(_ROOTFS_SUFFIXES) and (path.is_file() or ":" not in text):
        if not path.is_file():
            raise UsageProblem(f"{path} does not exist", hint="name an existing rootfs tar, or write oci-archive:PATH")
        return ImageReference(text=text, kind=ImageKind.ROOTFS_TAR, skopeo=None, path=path)
    if (explicit or "/" in text) and path.is_dir():
        return _directory(text, path)
    if explicit:
        cause = "is neither a directory nor a rootfs tar" if path.exists() else "does not exist"
        raise UsageProblem(f"{path} {cause}", hint=f"a tar ends in {', '.join(_ROOTFS_SUFFIXES)}")
    return None


def _directory(text: str, path: Path) -> ImageReference:
    if (path / "oci-layout").is_file():
        raise UsageProblem(f"{path} is an OCI layout, not a root file system", hint=f"write oci:{text}")
    if (path / "version").is_file() and (path / "manifest.json").is_file():
        raise UsageProblem(f"{path} is an image in skopeo's dir: layout", hint=f"write dir:{text}")
    return ImageReference(text=text, kind=ImageKind.ROOTFS_DIR, skopeo=None, path=path)


def _docker(text: str, name: str) -> ImageReference:
    registry, slash, rest = name.partition("/")
    if not slash or not (set(registry) & set(".:[") or registry == "localhost" or registry != registry.lower()):
        registry, rest = "docker.io", name
    match = _NAME.fullmatch(rest)
    if match is None or not _REGISTRY.fullmatch(registry):
        raise _not_a_name(text, registry if slash and rest != name else "", rest)
    repository, tag, digest = match["repository"], match["tag"], match["digest"]
    if registry in ("docker.io", "index.docker.io"):
        registry = "docker.io"
        repository = repository if "/" in repository else f"library/{repository}"
    # skopeo refuses a tag with a digest, and the digest is exact.
    version = f"@{digest}" if digest else f":{tag or 'latest'}"
    return ImageReference(
        text=text, kind=ImageKind.DOCKER, skopeo=f"docker://{registry}/{repository}{version}", registry=registry
    )


def _not_a_name(text: str, registry: str, rest: str) -> UsageProblem:
    """Return the problem. If only capitals are wrong, the hint has the name in lower case."""
    path, slash, last = rest.rpartition("/")
    name, colon, version = last.partition("@" if "@" in last else ":")
    lowered = f"{path.lower()}{slash}{name.lower()}{colon}{version}"
    if lowered != rest and _NAME.fullmatch(lowered):
        hint = f"write {registry}{'/' if registry else ''}{lowered}"
        return UsageProblem(f"{_shown(text)!r} is not an image's name: repository names are lower case", hint=hint)
    return UsageProblem(f"{_shown(text)!r} is not an image's name", hint=_FORMS)


def _absolute(name: str, base: Path) -> Path:
    return Path(base, expand_home(name)).absolute()


def _shown(text: str) -> str:
    return _USERINFO.sub("", text)
