"""Nothing outlives the process that owns a supervisor, however it dies. Real processes, judged by /proc."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.host.supervisor.janitor import sweep

StartOwner = Callable[[str], Any]


def test_sigkill_of_the_owner_leaves_no_process_and_no_directory(start_owner: StartOwner) -> None:
    owner = start_owner("serving")
    owner.hear()
    assert len(owner.wait_for_families()) == 3 + 3 * 4
    owner.process.kill()
    owner.process.wait()
    assert owner.wait_until_left(set()) == set()
    assert owner.wait_until_gone()


@pytest.mark.parametrize("attempt", range(4))
def test_sigkill_right_after_the_start_leaves_nothing(start_owner: StartOwner, attempt: int) -> None:
    owner = start_owner("started")
    owner.process.kill()
    owner.process.wait()
    assert owner.wait_until_left(set()) == set()
    assert owner.wait_until_gone()


@pytest.mark.parametrize("spawns", [1, 7, 40, 120])
def test_sigkill_in_a_burst_of_spawns_leaves_nothing(start_owner: StartOwner, spawns: int) -> None:
    owner = start_owner("burst")
    for _ in range(spawns):
        owner.hear()
    owner.process.kill()
    owner.process.wait()
    assert owner.wait_until_left(set()) == set()
    assert owner.wait_until_gone()


def test_a_forked_child_that_holds_the_sockets_keeps_nothing_alive(start_owner: StartOwner) -> None:
    owner = start_owner("serving")
    owner.hear()
    forked = owner.ask("fork")["forked"]
    owner.process.kill()
    owner.process.wait()
    assert owner.wait_until_left({forked}) == {forked}
    assert owner.wait_until_gone()


def test_teardown_in_a_forked_child_changes_nothing(start_owner: StartOwner) -> None:
    owner = start_owner("serving")
    owner.hear()
    before = owner.wait_for_families()
    assert owner.ask("close in a fork")["running"] == [True, True, True]
    assert owner.ask("spawn") == {"exit": 0, "running": [True, True, True]}
    assert owner.left() == before
    assert owner.run_dir.exists()


@pytest.mark.parametrize("victim", ["guard", "spawner"])
def test_sigkill_of_the_guard_or_the_spawner_ends_the_tree_and_the_owner_is_notified(
    start_owner: StartOwner, victim: str, run_root: Path
) -> None:
    owner = start_owner("serving")
    owner.hear()
    os.kill(owner.guard if victim == "guard" else owner.spawner(), signal.SIGKILL)
    assert owner.wait_until_left({owner.process.pid}) == {owner.process.pid}
    assert owner.ask("wait")["signals"] == [signal.SIGKILL] * 3
    owner.process.kill()
    owner.process.wait()
    sweep(run_root)
    assert not owner.run_dir.exists()


def test_a_spawner_that_hangs_does_not_keep_the_tree_alive(start_owner: StartOwner) -> None:
    owner = start_owner("serving")
    owner.hear()
    os.kill(owner.spawner(), signal.SIGSTOP)
    os.kill(owner.process.pid, signal.SIGKILL)
    owner.process.wait()
    assert owner.wait_until_left(set()) == set()
    assert owner.wait_until_gone()


def test_children_end_when_guard_and_spawner_are_killed_at_the_same_moment(
    start_owner: StartOwner, isolation: str
) -> None:
    owner = start_owner("serving")
    children = set(owner.hear()["children"])
    owner.wait_for_families()
    spawner = owner.spawner()
    os.kill(spawner, signal.SIGSTOP)  # so that it does not notice the guard's end
    os.kill(owner.guard, signal.SIGKILL)
    os.kill(spawner, signal.SIGKILL)
    assert owner.wait_until_ended(children)
    if isolation == "namespace":
        assert owner.wait_until_left({owner.process.pid}) == {owner.process.pid}


def test_a_spawner_in_a_namespace_dies_with_its_guard_even_when_it_hangs(
    start_owner: StartOwner, isolation: str
) -> None:
    if isolation != "namespace":
        pytest.skip("without a namespace the spawner has to live to kill its grandchildren")
    owner = start_owner("serving")
    owner.hear()
    os.kill(owner.spawner(), signal.SIGSTOP)
    os.kill(owner.guard, signal.SIGKILL)
    assert owner.wait_until_left({owner.process.pid}) == {owner.process.pid}


def test_a_stopped_owner_loses_nothing(start_owner: StartOwner) -> None:
    owner = start_owner("serving")
    owner.hear()
    before = owner.wait_for_families()
    owner.process.send_signal(signal.SIGSTOP)
    assert not wait_until(lambda: owner.left() != before, Deadline(0.5)), "something ended while the owner stood still"
    owner.process.send_signal(signal.SIGCONT)
    assert owner.ask("spawn") == {"exit": 0, "running": [True, True, True]}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_sigint_sigterm_and_sighup_do_not_end_guard_and_spawner(start_owner: StartOwner, number: int) -> None:
    owner = start_owner("serving")
    owner.hear()
    for pid in (owner.guard, owner.spawner()):
        os.kill(pid, number)
    assert owner.ask("spawn") == {"exit": 0, "running": [True, True, True]}


def test_a_keyboard_interrupt_at_the_terminal_does_not_reach_the_tree(start_owner: StartOwner) -> None:
    owner = start_owner("serving")
    children = owner.hear()["children"]
    sessions = {os.getsid(pid) for pid in (owner.process.pid, owner.guard, *children)}
    assert len(sessions) == 5, "every one has a session, and so a process group, of its own"
