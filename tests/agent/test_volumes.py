"""Directories that an image declares as volumes."""

import os
import shutil
import subprocess

import pytest

SHOWN = (
    "find . -exec stat -c '%n %F %a %u:%g %Y %h' {} + | sort; cat file sub/*; wc -c other; readlink link; ls -id *|"
    " awk '{print $1}' | sort | uniq -c | awk '{print $1}' | sort"
)


@pytest.fixture
def declare(make_guest, p):
    """Return a configured guest whose image declares these volumes."""

    def make(*paths, mib=256):
        guest = make_guest()
        guest.connect()
        guest.configure(*((p.VOLUME, path) for path in paths), (p.UPPER_MIB, mib))
        return guest

    return make


@pytest.fixture
def data(rootfs):
    """A directory of the image, with one file of each kind."""
    directory = rootfs / "srv/data"
    (directory / "sub").mkdir(parents=True)
    (directory / "file").write_text("was there\n")
    (directory / "other").hardlink_to(directory / "file")
    (directory / "link").symlink_to("/nowhere")
    (directory / "sub/set-user-id").write_text("x")
    if os.geteuid() == 0:
        os.chown(directory / "sub/set-user-id", 7, 8)
        os.chown(directory, 5, 6)
    (directory / "sub/set-user-id").chmod(0o4755)
    os.mkfifo(directory / "fifo")
    directory.chmod(0o2750)
    for path in (directory / "sub/set-user-id", directory / "sub", directory):
        os.utime(path, (1e9, 1e9))
    yield directory
    shutil.rmtree(rootfs / "srv")


def seen(client, script):
    stream = client.run("sh", "-c", script)
    assert stream.code == 0, stream.data[1]
    return stream.data[0].decode()


def test_a_volume_that_no_layer_has_is_made(declare):
    client = declare("/srv", "/srv/deep/er", "/var/new").client
    assert seen(client, "stat -c '%n %a %u:%g' /srv/deep/er /var/new") == ("/srv/deep/er 755 0:0\n/var/new 755 0:0\n")
    seen(client, "echo x > /srv/deep/er/file && echo y > /var/new/file")


def test_a_volume_has_the_content_of_the_image(declare, make_guest, data):
    plain = make_guest()
    plain.connect()
    before = seen(plain.configure(), f"cd /srv/data; {SHOWN}")
    client = declare("/srv/data").client
    assert seen(client, f"cd /srv/data; {SHOWN}") == before
    seen(client, "echo more >> /srv/data/file; grep -q more /srv/data/other")
    assert (data / "file").read_text() == "was there\n"


def test_a_volume_is_not_on_the_overlay(declare, data):
    client = (guest := declare("/srv/data", "/srv/data/inner", "/srv/data/sub")).client
    assert "is on the overlay" not in guest.log.read_text()
    for place in ("/srv/data", "/srv/data/inner", "/srv/data/sub"):
        assert seen(client, f"stat -f -c %T {place}").strip() == "tmpfs"
    assert seen(client, "stat -f -c %T /srv").strip() != "tmpfs"
    make = "mkdir l u w m && mount -t overlay none -o lowerdir=l,upperdir=u,workdir=w m"
    if client.run("sh", "-c", f"mkdir -p /tmp/t && cd /tmp/t && mount -t tmpfs none . && {make}").code:
        pytest.skip("this machine's kernel does not mount overlays here")
    seen(client, f"cd /srv/data/inner && {make}")


def test_a_volume_behind_a_symlink_of_the_image_is_where_that_leads(declare, rootfs):
    (rootfs / "opt").symlink_to("/home/opt")
    (rootfs / "home/opt").mkdir(parents=True)
    client = declare("/opt/data").client
    (rootfs / "opt").unlink()
    shutil.rmtree(rootfs / "home")
    assert seen(client, "stat -f -c %T /home/opt/data").strip() == "tmpfs"


@pytest.mark.parametrize("path", ["/proc", "/dev/shm", "/bin/busybox", "/"])
def test_a_path_that_cannot_be_a_volume_stays_as_it_was(declare, path):
    client = declare(path, "/srv/good").client
    assert seen(client, "stat -f -c %T /srv/good").strip() == "tmpfs"
    assert seen(client, "test -e /proc/self && test -x /bin/busybox && stat -c %a /dev/shm") == "1777\n"


def test_a_volume_with_too_much_content_stays_on_the_overlay(declare, data):
    (data / "big").write_bytes(b"x" * (20 << 20))
    client = (guest := declare("/srv/data", "/srv/small", mib=32)).client
    assert seen(client, "wc -c < /srv/data/big").strip() == str(20 << 20)
    assert seen(client, "stat -f -c %T /srv/data").strip() != "tmpfs"
    assert seen(client, "stat -f -c %T /srv/small").strip() == "tmpfs"
    assert "the volume /srv/data is on the overlay: copy: No space left on device" in guest.log.read_text()


def test_the_content_of_volumes_counts_as_written_and_is_copied_out(declare, p, tmp_path):
    client = declare("/srv/data").client
    seen(client, "head -c 10000000 /dev/zero > /srv/data/big; echo here > /srv/data/note")
    metrics = dict(text.split("=") for text in client.call(p.METRICS)[p.METRIC])
    assert int(metrics["overlay_used_bytes"]) > 10_000_000
    stream = client.open(p.TAR_OUT, (p.PATH, "/srv"))
    client.wait(lambda: stream.exit)
    subprocess.run(["tar", "-xC", tmp_path], input=bytes(stream.data[0]), check=True)
    assert (tmp_path / "data/note").read_text() == "here\n"
