"""The writable layer over the image: it does what programs expect of a file system."""

from __future__ import annotations

import pytest

from pytest_fcvm import Clone, CloneFactory

NUMBERS = "stat -c %d:%i /srv/new/a /srv/new/b /usr/share /etc/passwd /etc"
SET_ATTRIBUTE = """
open(my $f, ">", "/srv/file"); my ($path, $name, $value) = ("/srv/file", "user.note", "1");
syscall(188, $path, $name, $value, 1, 0) == 0 or die $!
"""
TMPFILE = """my $path = "/srv"; syscall(2, $path, 020200001, 0600) >= 0 or die $!"""
DIRECT = "dd if=/dev/zero of=/srv/direct bs=4096 count=4 oflag=direct"


def test_inode_and_device_numbers_do_not_change(fcvm_clone: Clone) -> None:
    fcvm_clone.succeed("mkdir -p /srv/new/a /srv/new/b")
    before = fcvm_clone.succeed(NUMBERS)
    fcvm_clone.succeed("sync; echo 2 > /proc/sys/vm/drop_caches")
    assert fcvm_clone.succeed(NUMBERS) == before
    fcvm_clone.succeed("echo '# more' >> /etc/passwd")
    assert fcvm_clone.succeed(NUMBERS) == before
    assert len({line.partition(":")[0] for line in before.split()}) == 1


def test_a_directory_of_the_image_can_be_renamed(fcvm_clone: Clone) -> None:
    program = 'rename("/usr/share", "/usr/renamed") or die $!'
    fcvm_clone.succeed(["perl", "-e", program])
    assert fcvm_clone.succeed("ls -d /usr/renamed/perl5").strip() == "/usr/renamed/perl5"


@pytest.mark.parametrize("disk", [None, "256M"])
def test_attributes_and_direct_io_require_linux_6_6_or_a_disk(
    fcvm_clone_factory: CloneFactory, disk: str | None
) -> None:
    clone = fcvm_clone_factory(**({"disk": disk} if disk else {}))
    is_new = _release(clone) >= (6, 6)
    assert (clone.exec(["perl", "-e", SET_ATTRIBUTE]).exit_code == 0) is (is_new or bool(disk))
    assert (clone.exec(DIRECT).exit_code == 0) is (is_new or bool(disk))
    assert (clone.exec(["perl", "-e", TMPFILE]).exit_code == 0) is is_new


def _release(clone: Clone) -> tuple[int, int]:
    major, minor = clone.succeed("uname -r").split(".")[:2]
    return int(major), int(minor)
