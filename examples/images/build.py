#!/usr/bin/env python3
"""Build small real images (nginx, redis, python, java, systemd, postgres) from packages, without a registry.

    build.py nginx DIR

makes the OCI layout DIR/nginx with the tag `latest`, unless the same recipe has made it before. It takes 10 to 30 s.
It requires mmdebstrap and the apt sources of this host. Run it as root, or as a user with subordinate ids.
Format: the OCI image layout specification, one uncompressed layer.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

_ENTRYPOINTS = Path(__file__).parent
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


_JAVA_SERVER = """
import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
public class Server {
  public static void main(String[] words) throws Exception {
    HttpServer server = HttpServer.create(new InetSocketAddress(8000), 0);
    server.createContext("/", exchange -> {
      byte[] answer = ("java " + System.getProperty("java.version")).getBytes();
      exchange.sendResponseHeaders(200, answer.length);
      exchange.getResponseBody().write(answer);
      exchange.close();
    });
    server.start();
  }
}
"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The packages of an image and its configuration; `entrypoint` is a script beside this file."""

    packages: tuple[str, ...]
    config: dict[str, object]
    entrypoint: str = ""
    hooks: tuple[str, ...] = field(default=())


RECIPES = {
    "nginx": Recipe(
        packages=("nginx-light",),
        config={
            "Cmd": ["nginx", "-g", "daemon off;"],
            "ExposedPorts": {"80/tcp": {}},
            "StopSignal": "SIGQUIT",
            "Env": [_PATH],
        },
        hooks=("ln -sf /dev/stdout $1/var/log/nginx/access.log", "ln -sf /dev/stderr $1/var/log/nginx/error.log"),
    ),
    "redis": Recipe(
        packages=("redis-server",),
        config={
            "Entrypoint": ["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--daemonize", "no"],
            "ExposedPorts": {"6379/tcp": {}},
            "User": "redis",
            "WorkingDir": "/var/lib/redis",
            "Env": [_PATH],
        },
    ),
    "python": Recipe(
        packages=("python3",),
        config={
            "Cmd": ["python3", "-m", "http.server", "--directory", "/usr/share", "8000"],
            "ExposedPorts": {"8000/tcp": {}},
            "Env": [_PATH, "PYTHONUNBUFFERED=1"],
        },
    ),
    "java": Recipe(
        packages=("openjdk-17-jdk-headless",),
        config={
            "Cmd": ["java", "-Xmx128m", "-cp", "/srv", "Server"],
            "ExposedPorts": {"8000/tcp": {}},
            "Env": [_PATH],
        },
        hooks=(f"printf %s '{_JAVA_SERVER}' > $1/srv/Server.java", "chroot $1 javac -d /srv /srv/Server.java"),
    ),
    "systemd": Recipe(
        packages=("systemd", "systemd-sysv", "dbus", "nginx-light"),
        config={"Cmd": ["/sbin/init"], "ExposedPorts": {"80/tcp": {}}, "Env": [_PATH]},
    ),
    "postgres": Recipe(
        packages=("postgresql", "util-linux"),
        config={
            "Entrypoint": ["/usr/local/bin/postgres-entrypoint.sh"],
            "Cmd": ["postgres"],
            "ExposedPorts": {"5432/tcp": {}},
            "StopSignal": "SIGINT",
            "Env": ["PGDATA=/var/lib/postgresql/data", "LANG=C.UTF-8", f"{_PATH}:/usr/lib/postgresql/15/bin"],
        },
        entrypoint="postgres-entrypoint.sh",
        hooks=(
            "rm -rf $1/var/lib/postgresql/15 $1/etc/postgresql/15",
            # The just-in-time compiler is two thirds of the image, and the server works without it.
            "rm -f $1/usr/lib/postgresql/15/lib/llvmjit.so",
            "rm -f $1/usr/lib/x86_64-linux-gnu/libLLVM* $1/usr/lib/x86_64-linux-gnu/libz3*",
        ),
    ),
}


def build(name: str, directory: Path, recipe: Recipe | None = None) -> Path:
    """Return the OCI layout of an image. Build it unless the same recipe has built it there before."""
    recipe = recipe or RECIPES[name]
    layout = directory / name
    script = _ENTRYPOINTS / recipe.entrypoint if recipe.entrypoint else None
    stamp = hashlib.sha256(repr(recipe).encode() + (script.read_bytes() if script else b"")).hexdigest()
    made = layout / "recipe"
    if made.exists() and made.read_text() == stamp:
        return layout
    shutil.rmtree(layout, ignore_errors=True)
    fresh = directory / f"{name}.tmp-{os.getpid()}"
    (fresh / "blobs/sha256").mkdir(parents=True)
    try:
        layer = fresh / "layer.tar"
        _bootstrap(recipe, script, layer)
        _drop_devices(layer)
        write_layout(fresh, layer.read_bytes(), recipe.config)
        layer.unlink()
        (fresh / "recipe").write_text(stamp)
        fresh.rename(layout)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return layout


def _bootstrap(recipe: Recipe, script: Path | None, layer: Path) -> None:
    hooks = list(recipe.hooks)
    if script:
        hooks.append(f'install -m 755 "{script}" "$1/usr/local/bin/{script.name}"')
    unwanted = ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/cache/apt", "var/lib/apt/lists")
    hooks += [f'rm -rf "$1/{directory}"' for directory in unwanted]
    command = ["mmdebstrap", "--quiet", "--variant=essential", f"--include={','.join(recipe.packages)}"]
    command += ['--aptopt=Acquire::Check-Valid-Until "false"', '--aptopt=Acquire::Check-Date "false"']
    command += [f"--customize-hook={hook}" for hook in hooks]
    subprocess.run([*command, _codename(), str(layer), "-"], input=_apt_sources(), check=True)


def _codename() -> str:
    lines = Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
    return next(line.split("=", 1)[1].strip('"') for line in lines if line.startswith("VERSION_CODENAME="))


def _apt_sources() -> bytes:
    """Return the apt sources of this host. mmdebstrap reads both styles, but only one of them in a stream."""
    deb822 = sorted(Path("/etc/apt/sources.list.d").glob("*.sources"))
    one_line = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*.list"))]
    files = deb822 or [path for path in one_line if path.exists()]
    return b"\n\n".join(path.read_bytes() for path in files)


def write_layout(directory: Path, layer: bytes, image_config: dict[str, object]) -> None:
    """Write an OCI layout with one layer (an uncompressed tar) and the tag `latest`. `directory` has `blobs/sha256`."""
    layer_blob = _add_blob(directory, layer, "application/vnd.oci.image.layer.v1.tar")
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": image_config,
        "rootfs": {"type": "layers", "diff_ids": [layer_blob["digest"]]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": _add_blob(directory, json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": [layer_blob],
    }
    entry = _add_blob(directory, json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
    tagged = {**entry, "annotations": {"org.opencontainers.image.ref.name": "latest"}}
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [tagged]}))
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def _add_blob(directory: Path, data: bytes, media_type: str) -> dict[str, object]:
    digest = hashlib.sha256(data).hexdigest()
    (directory / "blobs/sha256" / digest).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}


def _drop_devices(layer: Path) -> None:
    """Remove /dev from a layer: a container engine makes its own."""
    kept = layer.with_suffix(".kept")
    with tarfile.open(layer) as source, tarfile.open(kept, "w", format=tarfile.PAX_FORMAT) as target:
        for member in source:
            if not member.name.startswith("./dev/"):
                target.addfile(member, source.extractfile(member) if member.isreg() else None)
    kept.replace(layer)


def main() -> int:
    """Build the images named on the command line."""
    if len(sys.argv) < 3 or not set(sys.argv[1:-1]) <= set(RECIPES):
        print(f"usage: build.py {{{'|'.join(RECIPES)}}} … DIR", file=sys.stderr)
        return 2
    directory = Path(sys.argv[-1])
    directory.mkdir(parents=True, exist_ok=True)
    try:
        for name in sys.argv[1:-1]:
            print(build(name, directory))
    except subprocess.CalledProcessError as error:
        print(f"{error.cmd[0]} failed; without root, it requires the package uidmap", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
