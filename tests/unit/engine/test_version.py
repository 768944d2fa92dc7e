from __future__ import annotations

import pytest

from pytest_fcvm.engine.qemu.version import OLDEST, QemuVersion, parse_version


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright", (7, 2, 22)),
        ("QEMU emulator version 8.2.2 (Debian 1:8.2.2+ds-0ubuntu1.7)", (8, 2, 2)),
        ("QEMU emulator version 10.0.13 (Debian 1:10.0.13+ds-0+deb13u1)", (10, 0, 13)),
        ("QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)", (11, 1, 3)),
        ("QEMU emulator version 9.2.50 (v9.2.0-1234-gabcdef)", (9, 2, 50)),
        ("QEMU emulator version 11.0", (11, 0, 0)),
    ],
)
def test_versions_are_read_as_distributions_print_them(said: str, version: tuple[int, int, int]) -> None:
    assert parse_version(said) == version


def test_another_program_has_no_version() -> None:
    assert parse_version("bash, version 5.2.15") is None


@pytest.mark.parametrize(
    ("version", "by_path", "read_only"),
    [
        ((7, 2, 22), False, False),
        ((8, 1, 9), False, False),
        ((8, 2, 0), True, True),
        ((9, 1, 0), True, True),
        ((10, 0, 13), True, True),
        ((11, 1, 3), True, True),
    ],
)
def test_each_version_has_its_abilities(version: tuple[int, int, int], by_path: bool, read_only: bool) -> None:
    found = QemuVersion(*version)
    assert found.takes_state_by_path is by_path
    assert found.opens_private_memory_read_only is read_only


def test_the_oldest_version_is_older_than_every_one_that_works() -> None:
    assert QemuVersion(7, 2, 0) >= OLDEST > QemuVersion(7, 1, 0)
