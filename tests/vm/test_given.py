"""What every container engine provides to an image, and what a workload knows of itself before its snapshot."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_fcvm import Clone, CloneFactory, FcvmError

NAMED = "hostname > /srv/name; echo '127.0.0.1 minio.local' >> /etc/hosts; exec nginx -g 'daemon off;'"


@pytest.mark.fcvm(command=["sh", "-c", NAMED], prepare="echo '10.1.2.3 api.local' >> /etc/hosts")
def test_a_workload_keeps_its_host_name_and_its_lines_in_etc_hosts(fcvm_clone: Clone) -> None:
    (fork,) = fcvm_clone.fork()
    for clone in (fcvm_clone, fork):
        names = {"fcvm-base": clone.ip, clone.name: clone.ip, "minio.local": "127.0.0.1", "api.local": "10.1.2.3"}
        assert clone.read_text("/srv/name") == clone.succeed("hostname") == "fcvm-base\n"
        for name, address in names.items():
            assert clone.succeed(["getent", "ahostsv4", name]).split()[0] == address
    fork.fail(["getent", "hosts", fcvm_clone.name])
    fcvm_clone.reset()
    assert fcvm_clone.succeed("hostname; getent hosts minio.local").split() == ["fcvm-base", "127.0.0.1", "minio.local"]


@pytest.mark.fcvm(
    hostname="db-1.example.test",
    shm_size="48M",
    ulimit=["nofile=2048:4096", "core=0"],
    sysctl={"net.core.somaxconn": 777, "vm.max_map_count": 300000},
    entrypoint=["sh", "-c", "hostname; ulimit -Sn; exec nginx -g 'daemon off;'"],
)
def test_docker_run_settings_apply_to_workload_and_commands(fcvm_clone: Clone) -> None:
    assert fcvm_clone.logs().splitlines()[:2] == ["db-1.example.test", "2048"]
    assert fcvm_clone.succeed("hostname; echo $HOSTNAME; getent hosts db-1 | cut -d' ' -f1").split() == [
        "db-1.example.test", "db-1.example.test", fcvm_clone.ip,
    ]  # fmt: skip
    assert fcvm_clone.succeed("ulimit -Sn; ulimit -Hn; ulimit -c").split() == ["2048", "4096", "0"]
    assert fcvm_clone.succeed("cd /proc/sys; cat net/core/somaxconn vm/max_map_count").split() == ["777", "300000"]
    assert fcvm_clone.succeed("df -m --output=size /dev/shm").split()[-1] == "48"


@pytest.mark.parametrize(
    ("wrong", "message", "hint"),
    [
        ({"sysctl": {"net.core.nonesuch": 1}}, "the guest's kernel has no sysctl net.core.nonesuch", "--fcvm-sysctl"),
        ({"sysctl": {"vm.max_map_count": "many"}}, "sysctl vm.max_map_count=many: Invalid argument", "--fcvm-sysctl"),
        ({"ulimit": {"nofile": 2_000_000}}, "ulimit nofile=2000000: Operation not permitted", "--fcvm-ulimit"),
    ],
)
def test_settings_that_the_kernel_refuses_are_reported(
    wrong: dict[str, object], message: str, hint: str, fcvm_clone_factory: CloneFactory
) -> None:
    with pytest.raises(FcvmError) as caught:
        fcvm_clone_factory(**wrong)
    assert message in caught.value.message
    assert hint in caught.value.hint


SHOW = (
    "ulimit -Sn; ulimit -Hn; sed -n 's/^Max processes *//p' /proc/self/limits | cut -d' ' -f1; ulimit -l; ulimit -Hc;"
    " cd /proc/sys; cat vm/max_map_count net/core/somaxconn"
)


@pytest.mark.parametrize("user", ["root", "www-data"])
def test_limits_and_kernel_settings_are_those_of_container_engines(fcvm_clone: Clone, user: str) -> None:
    soft, hard, processes, locked, core, maps, backlog = fcvm_clone.exec(SHOW, user=user, check=True).stdout.split()
    assert (soft, hard) == ("65536", "1048576")
    assert (processes, locked, core) == ("unlimited", "unlimited", "unlimited")
    assert (int(maps), int(backlog)) == (262144, 4096)
    settings = "cd /proc/sys/net/ipv4; cat ip_unprivileged_port_start ping_group_range; readlink /etc/mtab"
    assert fcvm_clone.succeed(settings).split() == ["0", "0", "2147483647", "/proc/mounts"]


@pytest.fixture
def configured(built_image: Callable[[str], str], tmp_path: Path) -> Callable[..., str]:
    """Return a function that makes an image of nginx's layer with another configuration."""

    def make(**config: object) -> str:
        layout = tmp_path / "layout"
        shutil.copytree(built_image("nginx").split(":")[1], layout, copy_function=os.link)
        index = json.loads((layout / "index.json").read_text())
        manifest = json.loads(_blob(layout, index["manifests"][0]).read_text())
        document = json.loads(_blob(layout, manifest["config"]).read_text())
        document["config"] |= config
        manifest["config"] |= _add_blob(layout, document)
        index["manifests"][0] |= _add_blob(layout, manifest)
        (layout / "index.json").unlink()
        (layout / "index.json").write_text(json.dumps(index))
        return f"oci:{layout}:latest"

    return make


def _blob(layout: Path, descriptor: dict[str, str]) -> Path:
    return layout / "blobs" / descriptor["digest"].replace(":", "/")


def _add_blob(layout: Path, document: object) -> dict[str, object]:
    data = json.dumps(document).encode()
    digest = hashlib.sha256(data).hexdigest()
    (layout / "blobs/sha256" / digest).write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}


OVERLAY = (
    "cd {} && mkdir l u w m && /busybox mount -t overlay none -o lowerdir=l,upperdir=u,workdir=w m && echo x > m/y"
)


@pytest.mark.parametrize("disk", [None, "128M"])
def test_volumes_have_the_images_content_and_support_an_overlay(
    disk: str | None, configured: Callable[..., str], fcvm_clone_factory: CloneFactory
) -> None:
    image = configured(Volumes={"/srv/deep/er": {}, "/var/lib/docker": {}, "/var/mail": {}, "/etc/nginx": {}})
    clone = fcvm_clone_factory(image=image, **({"disk": disk} if disk else {}))
    assert clone.succeed("stat -c '%a %u:%g' /srv/deep/er; stat -c '%a %G' /var/mail").split("\n")[:2] == [
        "755 0:0", "2775 mail",
    ]  # fmt: skip
    clone.copy_in(shutil.which("busybox") or "busybox", "/busybox")
    clone.succeed(OVERLAY.format("/var/lib/docker"))
    clone.fail(OVERLAY.format("/srv/deep"))
    (fork,) = clone.fork()
    assert fork.read_text("/var/lib/docker/u/y") == "x\n"


def test_a_user_without_privileges_serves_on_port_80(
    configured: Callable[..., str], fcvm_clone_factory: CloneFactory
) -> None:
    image = configured(User="33", WorkingDir="/not/there/yet")
    log = "access_log off; error_log stderr;"
    places = " ".join(f"{kind}_temp_path /tmp/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    http = f"events {{}} http {{ {log} {places} server {{ listen 80; return 204; }} }}"
    command = f"pwd; id -G; echo 'pid /tmp/pid; {http}' > /tmp/conf; exec nginx -c /tmp/conf -e stderr -g 'daemon off;'"
    clone = fcvm_clone_factory(image=image, command=["sh", "-c", command], ready="tcp:80", ready_timeout="60s")
    assert clone.logs().splitlines()[:2] == ["/not/there/yet", "33"]
    assert clone.succeed("pwd; id -u").split() == ["/not/there/yet", "33"]


def test_a_command_does_not_create_its_working_directory(fcvm_clone: Clone) -> None:
    result = fcvm_clone.exec(["pwd"], cwd="/typo/in/path")
    assert (result.exit_code, result.stderr) == (126, "fcvm: chdir /typo/in/path: No such file or directory\n")
    fcvm_clone.fail(["ls", "-d", "/typo"])
