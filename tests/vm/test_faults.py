"""Bad input and faults: a clear error with a hint at once, and nothing is left behind."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pytest_fcvm import (
    Clone,
    EngineError,
    GuestTimeout,
    HostError,
    ImageError,
    Prepare,
    Snapshot,
    SnapshotFactory,
    UsageProblem,
    VmSpec,
    WorkloadExited,
)
from pytest_fcvm.host.clock import monotonic
from tests.patience import PATIENCE


def test_an_image_that_does_not_exist(fcvm_snapshot_factory: SnapshotFactory, registry: str) -> None:
    with pytest.raises(ImageError, match="no-such-image") as caught:
        fcvm_snapshot_factory(image=f"{registry}/no-such-image:1")
    assert caught.value.hint


def test_a_workload_that_ends_before_it_is_ready(fcvm_snapshot_factory: SnapshotFactory) -> None:
    started = monotonic()
    with pytest.raises(WorkloadExited, match="exit code 7") as caught:
        fcvm_snapshot_factory(
            command=["sh", "-c", "echo cannot go on >&2; exit 7"], ready="tcp:80", ready_timeout="100s"
        )
    assert "cannot go on" in caught.value.evidence["workload log"]
    assert monotonic() - started < 60


def test_a_workload_that_does_not_exist(fcvm_snapshot_factory: SnapshotFactory) -> None:
    with pytest.raises((WorkloadExited, EngineError), match=r"no-such-program|127"):
        fcvm_snapshot_factory(command=["no-such-program"])


def test_readiness_that_never_comes(fcvm_snapshot_factory: SnapshotFactory) -> None:
    with pytest.raises(GuestTimeout, match=r"http:80/missing.*404") as caught:
        fcvm_snapshot_factory(ready="http:80/missing", ready_timeout="2s")
    assert "--fcvm-ready" in caught.value.hint
    assert "missing" in caught.value.evidence["workload log"]


def test_a_prepare_function_that_raises(fcvm_snapshot_factory: SnapshotFactory) -> None:
    with pytest.raises(Exception, match="no rows today"):
        fcvm_snapshot_factory(prepare=Prepare(_broken_prepare))


def _broken_prepare(_base: Clone) -> None:
    raise RuntimeError("no rows today")


def test_an_unknown_health_check(fcvm_snapshot_factory: SnapshotFactory) -> None:
    with pytest.raises(UsageProblem, match="no HEALTHCHECK"):
        fcvm_snapshot_factory(ready="healthcheck")


def test_a_vm_that_dies_fails_the_pending_call_at_once(fcvm_clone: Clone) -> None:
    with fcvm_clone.popen(["sleep", "1000"]) as process:
        os.kill(fcvm_clone.running.vm.pid, signal.SIGKILL)
        started = monotonic()
        with pytest.raises(EngineError, match=r"ended: somebody killed \w+ \(SIGKILL\)"):
            process.wait(60 * PATIENCE)
        assert monotonic() - started < 10
    with pytest.raises(EngineError, match=r"ended: somebody killed \w+ \(SIGKILL\)"):
        fcvm_clone.exec("true")


def test_a_kernel_panic_is_reported(fcvm_clone: Clone) -> None:
    with pytest.raises(EngineError) as caught:
        fcvm_clone.exec("echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 60", timeout=60)
    assert "panic" in (str(caught.value) + str(caught.value.evidence)).lower()


def test_a_workload_that_ends_later_stops_waits_and_nothing_else(fcvm_clone: Clone) -> None:
    fcvm_clone.exec("nginx -s stop")
    with pytest.raises(WorkloadExited):
        fcvm_clone.wait_for_log("never printed", timeout=60)
    assert fcvm_clone.exec(["echo", "alive"]).stdout == "alive\n"


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_snapshot_is_built_again(
    image: Callable[[str], str], cold_cache: Path, pytester: pytest.Pytester, damage: str
) -> None:
    pytester.makepyfile("def test_it(fcvm_clone): fcvm_clone.succeed('true')")
    # With "=": pytest would search for the ini file at the value of an option without it.
    arguments = (f"--fcvm-image={image('nginx')}", f"--fcvm-cache-dir={cold_cache}")
    pytester.runpytest_subprocess(*arguments).assert_outcomes(passed=1)
    (state,) = cold_cache.glob("snapshots/*/state")
    _damage(state, damage)
    again = pytester.runpytest_subprocess(*arguments)
    again.assert_outcomes(passed=1)
    again.stdout.fnmatch_lines(["*snapshots built 1, reused 0*", "*is quarantined and rebuilt: *"])


def _damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "remove":
        path.unlink()
        return
    if how == "truncate":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def test_a_pinned_host_port_that_is_taken(fcvm_snapshot: Snapshot) -> None:
    with fcvm_snapshot.clone() as first:
        taken = first.port(80)
        with pytest.raises(Exception, match=str(taken)):
            fcvm_snapshot.clone(publish=VmSpec().merged({"publish": (_pinned(taken),)}).publish)


def _pinned(port: int) -> object:
    from pytest_fcvm.model.net import PublishedPort

    return PublishedPort(guest_port=80, host_port=port)


@contextmanager
def _descriptors_left(count: int) -> Iterator[None]:
    """Let this process open this many more files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 40, hard)
    )
    opened: list[int] = []
    try:
        with suppress(OSError):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(count):
            os.close(opened.pop())
        yield
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_clone_without_a_file_descriptor_left(fcvm_snapshot: Snapshot) -> None:
    fcvm_snapshot.clone(name="before").close()
    for left in range(6):  # it requires more, in different steps
        with _descriptors_left(left), suppress(HostError), fcvm_snapshot.clone(name=f"with-{left}"):
            pass
    with _descriptors_left(0), pytest.raises(HostError, match="no file descriptor is left for none") as caught:
        fcvm_snapshot.clone(name="none")
    assert "ulimit -n" in caught.value.hint
    with fcvm_snapshot.clone(name="after") as clone:
        clone.succeed("true")


def _in_child(step: Callable[[], object]) -> str:
    """Return what a step raises in a forked process that ends as a test's own would."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            step()
        except BaseException as error:  # noqa: BLE001 - the parent gets any error
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read) as report:
        return report.read()


def test_a_forked_process_cannot_use_its_parents_clones(fcvm_clone: Clone, fcvm_snapshot: Snapshot) -> None:
    started = monotonic()
    steps: list[Callable[[], object]] = [
        lambda: fcvm_clone.exec(["true"]),
        fcvm_clone.reset,
        fcvm_clone.resume,
        fcvm_clone.fork,
        fcvm_snapshot.clone,
    ]
    for step in steps:
        raised = _in_child(step)
        assert raised.startswith("UsageProblem: a forked process can neither use nor start clones")
        assert "@pytest.mark.forked" in raised
    assert monotonic() - started < 20 * PATIENCE
    fcvm_clone.succeed("true")


def test_a_forked_process_ends_nothing_of_its_parents(fcvm_clone: Clone, fcvm_snapshot: Snapshot) -> None:
    def leave_blocks() -> None:
        with fcvm_snapshot, fcvm_clone:
            raise SystemExit(3)

    (fork,) = fcvm_clone.fork()
    assert _in_child(leave_blocks) == "SystemExit: 3"
    fcvm_clone.succeed("true")
    fork.succeed("true")
    with fcvm_snapshot.clone() as other:
        other.succeed("true")
