"""Our threads take no signal: it is for the main thread, which Python wakes."""

from __future__ import annotations

import signal
import threading

from pytest_fcvm.host.threads import ServiceThread


def test_a_service_thread_blocks_all_signals_and_its_creator_keeps_its_mask() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    masks: list[set[int]] = []
    thread = ServiceThread(lambda kept: kept.append(signal.pthread_sigmask(signal.SIG_BLOCK, [])), masks, name="ours")
    thread.start()
    thread.join()
    assert masks[0] >= {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGCHLD}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert (thread.name, thread.daemon) == ("ours", True)


def test_the_package_starts_no_other_kind_of_thread() -> None:
    import pathlib

    import pytest_fcvm

    package = pathlib.Path(pytest_fcvm.__file__).parent
    users = [path.name for path in package.rglob("*.py") if "threading.Thread(" in path.read_text()]
    assert users == []
    assert threading.main_thread().is_alive()
