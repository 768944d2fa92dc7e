"""What a snapshot is made of, and the key that says when two are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from pytest_fcvm.clone.commands import ExecDefaults
from pytest_fcvm.engine.disk import DISK_FORMAT
from pytest_fcvm.engine.protocol import Engine, EngineReport, GuestFiles, VmShape
from pytest_fcvm.errors import UsageProblem
from pytest_fcvm.host.own import os
from pytest_fcvm.image.config import ImageConfig
from pytest_fcvm.model.parse import parse_signal
from pytest_fcvm.model.specs import MappedPath, NetworkMode, NetworkSpec, Prepare, ReadySpec, VmSpec
from pytest_fcvm.ready import finalize_ready
from pytest_fcvm.store import MANIFEST_SCHEMA, Store, canonical_digest

__all__ = ["SnapshotInputs", "choose_ready", "snapshot_key"]

_INITS = ("/sbin/init", "/usr/sbin/init", "/usr/local/sbin/init")
_OWN_CODE = ("snapshot", "clone", "guest", "network", "host/archive.py", "model/guest.py", "ready.py")


@dataclass(frozen=True, kw_only=True)
class SnapshotInputs:
    """Everything a snapshot is built from. Digests name the files' contents.

    A base is snapshotted when `ready` holds. A clone that depends on others is ready when `ready_joined` holds.
    """

    spec: VmSpec
    ready: ReadySpec
    ready_joined: ReadySpec
    image: ImageConfig
    image_digest: str
    rootfs_key: str
    files: GuestFiles
    kernel_digest: str
    kernel_release: str
    initramfs_key: str
    engine: Engine
    report: EngineReport
    network: NetworkSpec

    @property
    def spec_before_tests(self) -> VmSpec:
        """Return the spec for a VM that no test has yet: without an address of its own."""
        return replace(self.spec, own_address=False)

    @property
    def network_note(self) -> str:
        """Say which network `auto` became, "" where it is the engine's first one."""
        wanted, engine = self.spec.network, self.engine
        if wanted.mode is not NetworkMode.AUTO or self.network.mode is engine.networks[0]:
            return ""
        return f"the network {wanted} is {self.network} on {engine.name}"

    @property
    def is_relayed(self) -> bool:
        """Say whether the ports of clones go through their agents."""
        return not self.network.mode.uses_netns

    @property
    def shape(self) -> VmShape:
        """Return what base and clones must have in common."""
        spec = self.spec
        return VmShape(
            mem_mib=spec.mem_mib,
            cpus=spec.cpus,
            network=self.network.mode,
            egress=self.network.egress,
            disk_mib=spec.disk_mib or 0,
            balloon=spec.balloon,
            metadata=spec.metadata is not None,
        )

    @property
    def rootfs(self) -> Path:
        """Return the image as one read-only file."""
        assert self.files.rootfs is not None
        return self.files.rootfs

    @property
    def argv(self) -> tuple[str, ...]:
        """Return the workload's command line. Raise UsageProblem for an image without one."""
        argv = tuple(self.image.argv(self.spec.command, self.spec.entrypoint))
        if not argv:
            raise UsageProblem(f"{self.spec.image} names no command to run", hint="give one with --fcvm-command")
        return argv

    @property
    def is_init(self) -> bool:
        """Say whether the workload is an init system. podman decides this by the program's name, too."""
        return self.argv[0] in _INITS or self.argv[0].rpartition("/")[2] == "systemd"

    @property
    def defaults(self) -> ExecDefaults:
        """Return environment, directory, user and stop signal for the workload and for commands beside it.

        An init system gets `container=fcvm` (systemd's container interface), so that it leaves devices and network
        alone.
        """
        image_env = dict(item.partition("=")[::2] for item in self.image.env)
        if self.is_init:
            image_env.setdefault("container", "fcvm")
        return ExecDefaults(
            stop_signal=parse_signal(self.image.stop_signal or ("SIGRTMIN+3" if self.is_init else "SIGTERM")),
            env={"HOSTNAME": self.spec.hostname, **image_env, **self.spec.env},
            cwd=self.spec.workdir or self.image.working_dir or "/",
            user=self.spec.user or self.image.user or "",
        )

    def about(self) -> dict[str, Any]:
        """Return a description of the snapshot for people. Of the environment it has the names, not the values."""
        spec, report = self.spec, self.report
        return {
            "image": spec.image,
            "image_digest": self.image_digest,
            "engine": f"{report.engine} {report.version}, {report.accelerator}",
            "engine_name": report.engine,
            "accelerator": str(report.accelerator),
            "kernel": self.kernel_release,
            "mem_mib": spec.mem_mib,
            "cpus": spec.cpus,
            "disk_mib": spec.disk_mib or 0,
            "command": list(self.argv),
            "env": sorted(spec.env),
            "hostname": spec.hostname,
            "network": str(self.network),
            "ready": str(self.ready),
            "prepared": spec.prepare is not None,
            "rootfs": self.rootfs_key,
        }


def choose_ready(wanted: ReadySpec | None, image: ImageConfig) -> ReadySpec:
    """Return the wanted readiness condition, or the image's own; see `finalize_ready`."""
    health = image.healthcheck
    if health is None:
        return finalize_ready(wanted, (), image.exposed_ports)
    return finalize_ready(
        wanted,
        health.test,
        image.exposed_ports,
        shell=image.shell,
        check_s=health.timeout_s,
        interval_s=health.interval_s,
    )


def snapshot_key(inputs: SnapshotInputs, store: Store) -> str:
    """Return the SHA-256 of everything that a clone depends on. Environment values enter as an HMAC."""
    spec = inputs.spec
    return canonical_digest(
        {
            "schema": MANIFEST_SCHEMA,
            "code": _own_code(),
            "image": inputs.image_digest,
            "config": inputs.image.to_json(),
            "rootfs": inputs.rootfs_key,
            "kernel": inputs.kernel_digest,
            "initramfs": inputs.initramfs_key,
            "engine": inputs.report.engine,
            "accelerator": str(inputs.report.accelerator),
            "host": dict(inputs.report.identity),
            "arguments": list(inputs.engine.base_arguments(inputs.shape)),
            "disk": [inputs.shape.disk_mib, DISK_FORMAT],
            "command": list(inputs.argv),
            "user": spec.user,
            "workdir": spec.workdir,
            "hostname": spec.hostname,
            "shm": spec.shm_mib,
            "ulimits": dict(spec.ulimits),
            "sysctls": dict(spec.sysctls),
            "env": store.hidden_digest(spec.env),
            "metadata": store.hidden_digest(spec.metadata) if spec.metadata is not None else None,
            "network": str(inputs.network),
            "map": [_map_identity(item) for item in spec.map],
            "ready": _ready_identity(inputs.ready),
            "prepare": spec.prepare.identity() if isinstance(spec.prepare, Prepare) else spec.prepare,
        }
    )


def _ready_identity(ready: ReadySpec) -> Mapping[str, Any]:
    return {
        "mode": str(ready.mode),
        "port": ready.port,
        "text": ready.text,
        "times": ready.times,
        "argv": list(ready.argv),
        "others": list(ready.others),
    }


def _map_identity(item: MappedPath) -> list[str]:
    digest, root = hashlib.sha256(), Path(os.path.realpath(item.host))  # a link is what it leads to
    for path in [root, *sorted(root.rglob("*"))]:
        status = path.lstat()
        owner = "" if item.owner else f"{status.st_uid}:{status.st_gid}"
        digest.update(os.fsencode(f"{path.relative_to(root)}\0{status.st_mode:o}\0{owner}\0"))
        digest.update(_content(path))
    return [item.guest, str(item.read_only), item.owner or "", digest.hexdigest()]


def _content(path: Path) -> bytes:
    """Return a digest of a file's content or a link's target, b"" for other kinds of files."""
    try:
        if path.is_symlink():
            return os.fsencode(path.readlink())
        if not path.is_file():
            return b""
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise UsageProblem(
            f"map: {path} cannot be read: {error.strerror}", hint="map what this user may read"
        ) from error


@cache
def _own_code() -> str:
    """Return a digest of our code that configures guests: a new version never reuses an old version's snapshots."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for name in _OWN_CODE:
        place = package / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(path.read_bytes())
    return digest.hexdigest()
