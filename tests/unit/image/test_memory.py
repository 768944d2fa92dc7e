"""Memory stays bounded for a layer of any size."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import pytest

LAYER_MIB = int(os.environ.get("FCVM_TEST_LAYER_MIB", "300"))

# Run in a process of its own, so that the peak is that of one build.
BUILD = """
import json, resource, sys
from pathlib import Path
from pytest_fcvm.image.reference import parse_reference
from pytest_fcvm.image.rootfs import build_rootfs
from pytest_fcvm.image.source import PullPolicy, resolve_image

base = Path(sys.argv[1])
reference = parse_reference("dir:image", base=base)
image = resolve_image(reference, images_dir=base, pull=PullPolicy.MISSING, progress=lambda text: None)
build_rootfs(image, base / "rootfs", progress=lambda text: None)
image.discard()
status = Path("/proc/self/status").read_text()  # getrusage includes the peak of the parent
own = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps({"own": own >> 10, "children": children >> 10}))
"""


def write_image(directory: Path, mib: int) -> None:
    """Write an image of one gzip layer: a large random file, and as many small files as a large image."""
    directory.mkdir()
    noise = os.urandom(1 << 20)
    pack = zlib.compressobj(1, wbits=31)
    diff, whole = hashlib.sha256(), hashlib.sha256()
    blob = (directory / "blob").open("wb")

    def feed(data: bytes) -> None:
        diff.update(data)
        packed = pack.compress(data)
        whole.update(packed)
        blob.write(packed)

    for number in range(20_000):
        info = tarfile.TarInfo(f"usr/lib/d{number % 100}/file-{number}")
        info.size = 100
        feed(info.tobuf() + noise[:100] + bytes(412))
    info = tarfile.TarInfo("big")
    info.size = mib << 20
    feed(info.tobuf())
    for number in range(mib):
        feed(noise if number % 4 == 0 else bytes([number % 256]) * (1 << 20))
    feed(bytes(1024))
    packed = pack.flush()
    whole.update(packed)
    blob.write(packed)
    blob.close()
    size, digest = (directory / "blob").stat().st_size, whole.hexdigest()
    (directory / "blob").rename(directory / digest)
    document = {"architecture": "amd64", "os": "linux", "rootfs": {"diff_ids": [f"sha256:{diff.hexdigest()}"]}}
    config = json.dumps(document).encode()
    config_digest = hashlib.sha256(config).hexdigest()
    (directory / config_digest).write_bytes(config)
    docker = "application/vnd.docker"
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{docker}.distribution.manifest.v2+json",
        "config": {
            "mediaType": f"{docker}.container.image.v1+json",
            "digest": f"sha256:{config_digest}",
            "size": len(config),
        },
        "layers": [{"mediaType": f"{docker}.image.rootfs.diff.tar.gzip", "digest": f"sha256:{digest}", "size": size}],
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    (directory / "version").write_text("Directory Transport Version: 1.1\n")


@pytest.mark.skipif(
    not (shutil.which("skopeo") and shutil.which("mksquashfs")), reason="skopeo or mksquashfs is not installed"
)
def test_a_large_layer_is_built_in_bounded_memory(tmp_path):
    write_image(tmp_path / "image", LAYER_MIB)
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", BUILD, tmp_path], cwd=root, stdout=subprocess.PIPE, check=True, text=True
    )
    peak = json.loads(done.stdout)
    print(f"{LAYER_MIB} MiB layer, peaks in MiB: {peak}")
    assert (tmp_path / "rootfs").stat().st_size > LAYER_MIB << 18
    # 38 MiB for 300 MiB and for 1 GiB, most of it the interpreter, the package and 20,000 names
    assert peak["own"] < 50
    assert peak["children"] < 800
