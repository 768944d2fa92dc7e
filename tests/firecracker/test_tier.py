"""The VM tier on a real Firecracker: the same tests, the same assertions."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.firecracker.conftest import ROOT, KvmHost

TESTS = (
    "test_clone.py",
    "test_lives.py",
    "test_freeze.py",
    "test_pool.py",
    "test_disk.py",
    "test_faults.py",
    "test_fork.py",
    "test_owners.py",
    "test_keep.py",
    "test_ports.py",
    "test_time.py",
    "test_given.py",
    "test_files.py",
    "test_one_shot.py",
    "test_layer.py",
    "test_memory.py",
    "test_kernel.py",
    "test_netns.py",
    "test_clone_settings.py",
    "test_cloud.py",
    "test_volume.py",
    "test_runs.py",
    "test_shell.py",
    "test_databases.py",
    "test_images.py",
    "test_systemd.py",
)
# Tests of QEMU, tests that a test below runs, and images that the emulated host has no room for.
ELSEWHERE = (
    *("test_engine.py", "test_jail.py", "test_network.py", "test_services.py"),
    *("test_rewind.py", "test_rewind_vmm.py"),
)
IN_JAIL = ("test_jail.py", "test_clone.py", "test_disk.py", "test_fork.py", "test_netns.py", "test_runs.py")
OF_OTHER_PROCESSES = ("test_runs.py", "test_shell.py", "test_keep.py")

PYTEST = "-m pytest -p no:cacheprovider -v"
Run = Callable[..., str]


@pytest.fixture
def run(host: KvmHost, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run Python in an emulated host and return its output. Show the output at once, because it takes minutes."""
    seen: list[str] = []

    def show(text: str) -> None:
        seen.append(text)
        with capfd.disabled():
            print(text, end="", flush=True)

    def run(arguments: str, more: str = "") -> str:
        settings = "FCVM_ENGINE=firecracker FCVM_TEST_FIRECRACKER=/work/bin/firecracker FCVM_TEST_PATIENCE=5"
        code = host.run(f"{settings} {more} python3 {arguments}", show)
        assert code == 0, "".join(seen)[-20000:]
        return "".join(seen)

    return run


def test_no_file_of_the_vm_tier_is_forgotten() -> None:
    assert sorted((*TESTS, *ELSEWHERE)) == sorted(path.name for path in (ROOT / "tests/vm").glob("test_*.py"))


@pytest.mark.parametrize("tests", TESTS)
def test_vm_tests_pass_on_firecracker(run: Run, tests: str) -> None:
    output = run(f"{PYTEST} tests/vm/{tests}")
    # In some files each test runs a pytest or a command of its own, whose output has the engine's name.
    assert "fcvm: engine firecracker/kvm" in output or tests in OF_OTHER_PROCESSES, output[-20000:]


@pytest.mark.usefixtures("jailer")
@pytest.mark.parametrize("tests", IN_JAIL)
def test_vm_tests_pass_in_the_jailer(run: Run, tests: str) -> None:
    run(f"{PYTEST} tests/vm/{tests}", "FCVM_JAILER=1")


def test_auto_chooses_firecracker_where_a_kernel_boots(run: Run) -> None:
    output = run(f"{PYTEST} tests/vm/test_clone.py -k answers_at_once", "FCVM_ENGINE=auto")
    assert "fcvm: engine firecracker/kvm" in output, output[-20000:]


def test_clones_of_both_engines_on_one_network(run: Run) -> None:
    output = run(f"{PYTEST} tests/vm/test_network.py", "FCVM_NETWORK=rootless")
    assert "fcvm: engine firecracker/kvm" in output, output[-20000:]


def test_the_fake_of_the_unit_tests_behaves_as_the_real_firecracker(run: Run) -> None:
    assert "skipped" not in run(f"{PYTEST} tests/firecracker/test_fake.py")


def test_two_hundred_clones_in_a_row_all_run_and_all_differ(run: Run) -> None:
    image = "--image oci:.demo/nginx:latest"
    assert "200 clones, 0 findings" in run(f"benchmarks/endurance.py --clones 200 --every 50 {image}")
