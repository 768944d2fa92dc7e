"""The VM tier on a real Firecracker: the same tests, the same assertions."""

from __future__ import annotations

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


Run = Callable[[str], str]


@pytest.fixture
def run(host: KvmHost, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run tests in an emulated host, show what they print at once, because they take minutes, and return it."""
    seen: list[str] = []

    def tell(text: str) -> None:
        seen.append(text)
        with capfd.disabled():
            print(text, end="", flush=True)

    def run(tests: str) -> str:
        settings = "FCVM_ENGINE=firecracker FCVM_TEST_FIRECRACKER=/work/bin/firecracker"
        code = host.run(f"{settings} python3 -m pytest -p no:cacheprovider -v {tests}", tell)
        assert code == 0, "".join(seen)[-20000:]
        return "".join(seen)

    return run


@pytest.mark.parametrize("tests", TESTS)
def test_vm_tests_pass_on_firecracker(run: Run, tests: str) -> None:
    assert "fcvm: engine firecracker/kvm" in run(f"tests/vm/{tests}")


def test_the_stand_in_of_unit_tests_is_true_to_the_real_one(run: Run) -> None:
    assert "skipped" not in run("tests/firecracker/test_fake.py")
