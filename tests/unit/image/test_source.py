"""Resolving references: local images with the real skopeo, records, detected changes, leftover files."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from fakes.images import HandmadeImage, entry, hardlink, sha256, symlink, tar_of

from pytest_fcvm.errors import HostError, ImageError
from pytest_fcvm.host import own
from pytest_fcvm.host.supervisor.janitor import sweep_temporary
from pytest_fcvm.image.reference import parse_reference
from pytest_fcvm.image.source import PulledImage, PullPolicy, resolve_image

pytestmark = pytest.mark.skipif(not shutil.which("skopeo"), reason="skopeo is not installed")

HEALTH = {"Test": ["CMD-SHELL", "curl -f localhost"], "Interval": 5_000_000_000, "Retries": 7}
CONFIG = {"Entrypoint": ["/entry"], "Cmd": ["run"], "Env": ["A=1"], "Healthcheck": HEALTH}
LAYERS = [tar_of(entry("a", b"one")), tar_of(entry("b", b"two"))]


@pytest.fixture
def resolve(tmp_path):
    """Resolve a reference, relative to tmp_path. `said` has the progress of all calls."""
    (tmp_path / "images").mkdir()

    def resolve_one(text, pull="missing", **options) -> PulledImage:
        return resolve_image(
            parse_reference(text, base=tmp_path),
            images_dir=tmp_path / "images",
            pull=PullPolicy(pull),
            progress=resolve_one.said.append,
            **options,
        )

    resolve_one.said = []
    return resolve_one


def left(tmp_path):
    return sorted(path.name for path in (tmp_path / "images").iterdir() if not path.name.startswith("reference-"))


def write_every_kind(directory):
    """Write one image in every layout and return the references."""
    image = HandmadeImage(layers=LAYERS, config=CONFIG)
    image.write_dir(directory / "d")
    HandmadeImage(layers=LAYERS, config=CONFIG, oci=True).write_oci(directory / "o")
    copies = {"docker-archive:da.tar": "docker-archive:{}/da.tar:x/y:1", "oci-archive:oa.tar": "oci-archive:{}/oa.tar"}
    for destination in copies.values():
        command = ["skopeo", "copy", "--quiet", f"dir:{directory}/d", destination.format(directory)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return ["dir:d", "oci:o", "oci:o:latest", *copies]


def test_an_image_of_every_local_kind_is_resolved_and_found_again_without_skopeo(tmp_path, resolve, monkeypatch):
    references = write_every_kind(tmp_path)
    first = [resolve(text) for text in references]
    for image in first:
        assert image.config.argv(None) == ("/entry", "run")
        assert len(image.layers) == 2
        image.discard()
    assert left(tmp_path) == []
    monkeypatch.setenv("PATH", "/nonexistent")
    resolve.said.clear()
    again = [resolve(text) for text in references]
    assert [image.digest for image in again] == [image.digest for image in first]
    assert [image.config for image in again] == [image.config for image in first]
    assert resolve.said == []
    assert left(tmp_path) == []


def test_a_docker_healthcheck_survives(tmp_path, resolve):
    HandmadeImage(layers=LAYERS, config=CONFIG).write_dir(tmp_path / "d")
    health = resolve("dir:d").config.healthcheck
    assert health is not None
    assert (health.test, health.interval_s, health.retries) == (("CMD-SHELL", "curl -f localhost"), 5.0, 7)
    assert health == resolve("dir:d").config.healthcheck


def test_the_digest_is_the_manifests(tmp_path, resolve):
    directory = HandmadeImage(layers=LAYERS).write_dir(tmp_path / "d")
    assert resolve("dir:d").digest == sha256((directory / "manifest.json").read_bytes())


def test_a_known_image_is_resolved_within_milliseconds(tmp_path, resolve):
    HandmadeImage(layers=LAYERS).write_dir(tmp_path / "d")
    resolve("dir:d").discard()
    times = []
    for _ in range(20):
        started = time.perf_counter()
        resolve("dir:d")
        times.append(time.perf_counter() - started)
    assert min(times) < 0.005


def test_layers_are_fetched_again_only_when_they_are_used(tmp_path, resolve):
    HandmadeImage(layers=LAYERS).write_dir(tmp_path / "d")
    resolve("dir:d").discard()
    image = resolve("dir:d")
    assert left(tmp_path) == []
    assert [layer.diff_id for layer in image.layers] == [sha256(layer) for layer in LAYERS]
    assert all(layer.path.is_file() for layer in image.layers)
    assert len(left(tmp_path)) == 1
    image.discard()
    assert left(tmp_path) == []


def test_the_layers_of_a_killed_process_are_swept_unless_their_lock_is_held(tmp_path, resolve):
    from pytest_fcvm.store import Collection, canonical_digest

    HandmadeImage(layers=LAYERS).write_dir(tmp_path / "d")
    name = canonical_digest({"image": "dir:d"})
    with Collection(path=tmp_path / "images").locked(name, "test", print):
        resolve("dir:d")
        (directory,) = [path for path in (tmp_path / "images").iterdir() if path.is_dir()]
        assert sweep_temporary(tmp_path / "images") == []
        assert directory.exists()
    assert sweep_temporary(tmp_path / "images") == [directory.name]


def replace_image(directory, **changes):
    shutil.rmtree(directory)
    return HandmadeImage(**{"layers": LAYERS, **changes}).write_dir(directory)


def test_a_changed_local_image_is_detected(tmp_path, resolve):
    HandmadeImage(layers=LAYERS).write_dir(tmp_path / "d")
    old = resolve("dir:d")
    replace_image(tmp_path / "d", layers=LAYERS[:1])
    for policy in ("never", "missing", "always"):
        new = resolve("dir:d", policy)
        assert new.digest != old.digest
    assert len(new.layers) == 1


def test_the_digest_of_a_root_filesystem_tar_is_that_of_its_content(tmp_path, resolve):
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(LAYERS[0])
    assert resolve("a.tar").digest == resolve("b.tar").digest == sha256(LAYERS[0])
    (tmp_path / "a.tar").write_bytes(LAYERS[1])
    assert resolve("a.tar").digest == sha256(LAYERS[1])


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "etc/a").write_bytes(b"other"),
        lambda root: (root / "etc/a").chmod(0o600),
        lambda root: (root / "etc/b").touch(),
        lambda root: (root / "link").symlink_to("etc"),
        lambda root: os.utime(root / "etc/a", (5, 5)),
    ],
)
def test_a_changed_directory_has_another_digest(tmp_path, resolve, change):
    root = tmp_path / "tree"
    (root / "etc").mkdir(parents=True)
    (root / "etc/a").write_bytes(b"equal")
    first = resolve("./tree")
    assert resolve("./tree").digest == first.digest
    change(root)
    assert resolve("./tree").digest != first.digest


@pytest.mark.parametrize("damage", [b"", b"{", b'{"schema": 1}', b"\xff\xfe", b"[]", b"null"])
def test_a_damaged_record_is_ignored(tmp_path, resolve, damage):
    HandmadeImage(layers=LAYERS).write_dir(tmp_path / "d")
    digest = resolve("dir:d").digest
    (record,) = (tmp_path / "images").glob("reference-*.json")
    record.write_bytes(damage)
    assert resolve("dir:d").digest == digest
    assert record.read_bytes() != damage


@pytest.mark.parametrize(("field", "value"), [("schema", 0), ("name", "dir:/other"), ("arch", "arm64"), ("stamp", "")])
def test_a_record_of_something_else_is_not_used(tmp_path, resolve, field, value):
    HandmadeImage(layers=LAYERS).write_dir(tmp_path / "d")
    resolve("dir:d")
    (record,) = (tmp_path / "images").glob("reference-*.json")
    record.write_text(json.dumps({**json.loads(record.read_text()), field: value, "digest": "sha256:wrong"}))
    assert resolve("dir:d").digest != "sha256:wrong"


def test_the_platform_of_an_index_is_chosen_by_the_architecture(tmp_path, resolve):
    arm = HandmadeImage(layers=LAYERS[:1], architecture="arm64", oci=True)
    HandmadeImage(layers=LAYERS, oci=True).write_oci(tmp_path / "o", platforms=[arm])
    assert resolve("oci:o").config.architecture == "amd64"
    assert resolve("oci:o", arch="arm64").config.architecture == "arm64"
    assert resolve("oci:o").config.architecture == "amd64"


def test_an_index_without_the_platform_is_reported(tmp_path, resolve):
    arm = HandmadeImage(layers=LAYERS, architecture="arm64", oci=True)
    arm.write_oci(tmp_path / "o", platforms=[HandmadeImage(layers=LAYERS, architecture="riscv64", oci=True)])
    with pytest.raises(ImageError) as caught:
        resolve("oci:o")
    assert "linux/amd64" in caught.value.hint
    assert left(tmp_path) == []


@pytest.mark.parametrize("platform", [{"architecture": "arm64"}, {"system": "windows"}])
def test_an_image_of_another_platform_is_reported(tmp_path, resolve, platform):
    HandmadeImage(layers=LAYERS, **platform).write_dir(tmp_path / "d")
    with pytest.raises(ImageError, match="guests on this host are linux/amd64"):
        resolve("dir:d")
    assert list((tmp_path / "images").iterdir()) == []


def test_an_archive_of_several_images_requires_a_name(tmp_path, resolve):
    directory = HandmadeImage(layers=LAYERS).write_dir(tmp_path / "d")
    for tag in ("1", "2"):
        command = ["skopeo", "copy", "--quiet", f"dir:{directory}", f"oci:{tmp_path}/o:{tag}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with pytest.raises(ImageError) as caught:
        resolve("oci:o")
    assert "oci:PATH:TAG" in caught.value.hint
    assert resolve("oci:o:2").digest


def test_a_reference_to_a_missing_tag_is_an_image_error(tmp_path, resolve):
    HandmadeImage(layers=LAYERS, oci=True).write_oci(tmp_path / "o")
    with pytest.raises(ImageError, match="cannot get image oci:o:2"):
        resolve("oci:o:2")


@pytest.mark.parametrize(
    "manifest",
    [
        b"no json",
        b"[" * 100_000,
        b'{"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json"}',
    ],
)
def test_a_broken_manifest_is_an_image_error_and_leaves_no_files(tmp_path, resolve, manifest):
    directory = HandmadeImage(layers=LAYERS).write_dir(tmp_path / "d")
    (directory / "manifest.json").write_bytes(manifest)
    with pytest.raises(ImageError):
        resolve("dir:d")
    assert list((tmp_path / "images").iterdir()) == []


def test_a_damaged_blob_is_an_image_error_and_leaves_no_files(tmp_path, resolve):
    directory = HandmadeImage(layers=LAYERS).write_dir(tmp_path / "d")
    blob = max((path for path in directory.iterdir() if len(path.name) == 64), key=lambda path: path.stat().st_size)
    blob.write_bytes(b"damage")
    with pytest.raises(ImageError):
        resolve("dir:d")
    assert list((tmp_path / "images").iterdir()) == []


def test_without_skopeo_the_error_names_the_package(tmp_path, resolve, monkeypatch):
    HandmadeImage(layers=LAYERS).write_dir(tmp_path / "d")
    monkeypatch.setattr(own.shutil, "which", lambda *_args, **_kw: None)
    with pytest.raises(HostError, match="skopeo is not installed") as caught:
        resolve("dir:d")
    assert caught.value.hint == "apt-get install skopeo"
    assert list((tmp_path / "images").iterdir()) == []


def test_a_full_disk_during_a_pull_is_a_host_error(tmp_path, resolve, monkeypatch):
    HandmadeImage(layers=[tar_of(entry("noise", os.urandom(3_000_000)))]).write_dir(tmp_path / "d")
    shim = tmp_path / "bin" / "skopeo"
    shim.parent.mkdir()
    # skopeo's message for ENOSPC; a limit on the file size would kill it by a signal
    shim.write_text(
        '#!/bin/sh\necho \'time="x" level=fatal msg="writing blob: write /x: no space left on device"\' >&2\nexit 1\n'
    )
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shim.parent}:{os.environ['PATH']}")
    with pytest.raises(HostError, match="no room left") as caught:
        resolve("dir:d")
    assert "--fcvm-cache-dir" in caught.value.hint
    assert left(tmp_path) == []


def test_a_read_only_cache_is_a_host_error(tmp_path, resolve):
    HandmadeImage(layers=LAYERS).write_dir(tmp_path / "d")
    (tmp_path / "images").rmdir()
    (tmp_path / "images").write_text("a file")
    with pytest.raises(HostError, match="cannot be written"):
        resolve("dir:d")


def test_a_record_that_cannot_be_written_is_a_host_error_and_leaves_no_partial_file(tmp_path, resolve):
    (tmp_path / "fs.tar").write_bytes(LAYERS[0])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(HostError, match=r"cannot be written: File too large"):
            resolve("fs.tar")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "images").iterdir()) == []


def test_podmans_storage_is_checked_every_time(tmp_path, resolve):
    storage = f"[vfs@{tmp_path}/storage+{tmp_path}/run]localhost/x:1"
    for layers in (LAYERS, LAYERS[:1]):
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        HandmadeImage(layers=layers, config=CONFIG).write_dir(tmp_path / "d")
        command = ["skopeo", "copy", "--quiet", f"dir:{tmp_path}/d", f"containers-storage:{storage}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"skopeo cannot write to containers-storage here: {done.stderr[-200:]}")
        image = resolve(f"containers-storage:{storage}")
        assert len(image.layers) == len(layers)
        image.discard()
        resolve.said.clear()
        assert resolve(f"containers-storage:{storage}", "never").digest == image.digest
        assert resolve.said == []


def test_the_hint_names_the_image_in_podman(tmp_path, resolve, monkeypatch):
    shim = tmp_path / "bin" / "podman"
    shim.parent.mkdir()
    shim.write_text('#!/bin/sh\n[ "$1 $2" = "image inspect" ] && echo localhost/mine:latest\n')
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shim.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("pytest_fcvm.image.skopeo.ASK_S", 20.0)
    with pytest.raises(ImageError) as caught:
        resolve("localhost:1/mine")
    assert "containers-storage:localhost/mine:latest" in caught.value.hint


def test_credentials_and_tokens_in_skopeos_messages_are_never_shown(tmp_path, resolve, monkeypatch):
    shim = tmp_path / "bin" / "skopeo"
    shim.parent.mkdir()
    words = 'Get \\"https://tester:open-sesame@host/v2/?token=SECRET-1&n=2\\": unauthorized'
    shim.write_text(f'#!/bin/sh\ncat >&2 <<\'END\'\ntime="x" level=fatal msg="{words}"\nEND\nexit 1\n')
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shim.parent}:{os.environ['PATH']}")
    with pytest.raises(ImageError) as caught:
        resolve("docker://registry.example/x:1")
    assert "https://host/v2/" in caught.value.message
    shown = f"{caught.value} {caught.value.evidence}"
    assert "open-sesame" not in shown
    assert "SECRET" not in shown
    assert caught.value.hint.startswith("skopeo login registry.example")


def test_skopeo_ends_when_its_caller_is_killed(tmp_path):
    """The shim keeps a FIFO open for writing, so the reader sees the end when all processes have ended."""
    if not shutil.which("setpriv"):
        pytest.skip("setpriv is not installed")
    HandmadeImage(layers=LAYERS).write_dir(tmp_path / "d")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    shim = tmp_path / "bin" / "skopeo"
    shim.parent.mkdir()
    shim.write_text(f"#!/bin/sh\nexec 3>{shlex.quote(str(fifo))}\necho started >&3\nexec sleep 1000\n")
    shim.chmod(0o755)
    code = (
        "from pathlib import Path\n"
        "from pytest_fcvm.image.reference import parse_reference\n"
        "from pytest_fcvm.image.source import PullPolicy, resolve_image\n"
        f"base = Path({str(tmp_path)!r})\n"
        "resolve_image(parse_reference('dir:d', base=base), images_dir=base, pull=PullPolicy.MISSING, progress=print)\n"
    )
    environment = {**os.environ, "PATH": f"{shim.parent}:{os.environ['PATH']}"}
    caller = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=Path(__file__).parents[3])
    with fifo.open() as reader:
        assert reader.readline() == "started\n"
        caller.kill()
        caller.wait()
        assert reader.read() == ""


def test_a_gzipped_tar_of_a_root_filesystem_is_accepted(tmp_path, resolve):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    (tmp_path / "fs.tar.gz").write_bytes(buffer.getvalue())
    (layer,) = resolve("fs.tar.gz").layers
    assert layer.path == tmp_path / "fs.tar.gz"


@pytest.mark.parametrize("transport", ["docker-archive", "oci-archive"])
@pytest.mark.parametrize("name", ["saved.tar", "saved.tar.gz", "./saved.tar"])
def test_an_image_given_as_a_root_filesystem_is_reported_with_its_transport(tmp_path, resolve, transport, name):
    write_every_kind(tmp_path)
    saved = (tmp_path / {"docker-archive": "da.tar", "oci-archive": "oa.tar"}[transport]).read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(saved) if name.endswith(".gz") else saved)
    with pytest.raises(ImageError, match="is an image, not a tar") as caught:
        resolve(name)
    assert caught.value.hint == f"write {transport}:{name}"
    resolve(caught.value.hint.removeprefix("write ")).discard()


@pytest.mark.parametrize("manifest", [b"[", b"{}", b'[{"a": 1}]', b"7"])
def test_a_root_filesystem_may_contain_a_manifest_json(tmp_path, resolve, manifest):
    (tmp_path / "root.tar").write_bytes(tar_of(entry("manifest.json", manifest), entry("bin/sh", b"x")))
    assert resolve("root.tar").digest


def saved_with_links(make_link):
    """Return an archive in which the first layer of two is a link to the second."""
    layer = LAYERS[0]
    diff_ids = [f"sha256:{hashlib.sha256(layer).hexdigest()}"] * 2
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": CONFIG,
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }
    manifest = [{"Config": "c.json", "RepoTags": ["x/y:1"], "Layers": ["one/layer.tar", "two/layer.tar"]}]
    return tar_of(
        entry("c.json", json.dumps(config).encode()),
        entry("two/layer.tar", layer),
        make_link("one/layer.tar"),
        entry("manifest.json", json.dumps(manifest).encode()),
    )


@pytest.mark.parametrize(
    "make_link",
    [lambda name: symlink(name, "../two/layer.tar"), lambda name: hardlink(name, "two/layer.tar")],
    ids=["symbolic", "hard"],
)
@pytest.mark.parametrize("chosen", ["", ":x/y:1"])
def test_a_saved_layer_may_be_a_link_to_another(tmp_path, resolve, make_link, chosen):
    (tmp_path / "s.tar").write_bytes(saved_with_links(make_link))
    image = resolve(f"docker-archive:s.tar{chosen}")
    assert image.config.argv(None) == ("/entry", "run")
    assert len(image.layers) == 2
    image.discard()
    assert left(tmp_path) == []


def test_a_saved_layer_that_is_a_link_without_a_target_is_an_image_error(tmp_path, resolve):
    (tmp_path / "s.tar").write_bytes(saved_with_links(lambda name: symlink(name, "../gone/layer.tar")))
    with pytest.raises(ImageError, match="cannot get image"):
        resolve("docker-archive:s.tar")
    assert left(tmp_path) == []
