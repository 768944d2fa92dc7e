"""The VM tier on a real Firecracker: the same tests, the same assertions."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.firecracker.conftest import KvmHost

TESTS = (
    "test_clone.py",
    "test_freeze.py",
    "test_pool.py",
    "test_disk.py",
    "test_faults.py",
    "test_volume.py",
    "test_runs.py",
    "test_shell.py",
    "test_databases.py",
    "test_images.py",
    "test_systemd.py",
)


@pytest.mark.parametrize("tests", TESTS)
def test_vm_tests_pass_on_firecracker(host: KvmHost, tests: str, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []
    command = f"FCVM_ENGINE=firecracker python3 -m pytest -p no:cacheprovider -v tests/vm/{tests}"
    code = host.run(command, _teller(seen, capfd))
    assert code == 0, "".join(seen)[-20000:]
    assert re.search(r"fcvm: engine firecracker/kvm", "".join(seen))


def _teller(seen: list[str], capfd: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Return a function that keeps a text, and shows it at once: these runs take minutes."""

    def tell(text: str) -> None:
        seen.append(text)
        with capfd.disabled():
            print(text, end="", flush=True)

    return tell
