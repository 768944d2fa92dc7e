"""Images that do their work and end: exit code and output are the result, and the clone has the files."""

from __future__ import annotations

import pytest

from pytest_fcvm import Clone, CloneFactory, GroupFactory, Prepare, WorkloadExited

MIGRATE = "echo migrated; echo rows > /srv/out; exit {code}"


def _command(code: int, before: str = "") -> list[str]:
    return ["sh", "-c", before + MIGRATE.format(code=code)]


@pytest.mark.parametrize(("ready", "code"), [("exit:0", 0), ("exit:3", 3), ("agent", 0)])
def test_a_clone_has_what_an_ended_workload_left(fcvm_clone_factory: CloneFactory, ready: str, code: int) -> None:
    clone = fcvm_clone_factory(command=_command(code), ready=ready)
    assert clone.exit_status is not None
    assert clone.wait().exit_code == code
    assert clone.logs() == "migrated\n"
    assert clone.wait_for_log("migrated")
    assert clone.read_text("/srv/out") == "rows\n"
    assert clone.wait_until_succeeds("cat /srv/out") == "rows\n"
    (fork,) = clone.fork()
    assert (fork.wait().exit_code, fork.logs(), fork.read_text("/srv/out")) == (code, "migrated\n", "rows\n")
    clone.reset()
    assert (clone.wait().exit_code, clone.logs()) == (code, "migrated\n")


def test_an_unexpected_exit_code_is_an_error_with_both_codes_and_the_log(fcvm_clone_factory: CloneFactory) -> None:
    with pytest.raises(WorkloadExited, match="the workload ended with exit code 3, not with 0") as caught:
        fcvm_clone_factory(command=_command(3, "sleep 1; "), ready="exit:0")
    assert "migrated" in caught.value.evidence["workload log"]


def _look(base: Clone) -> None:
    assert base.wait().exit_code == 0
    base.write_text("/srv/seen", base.read_text("/srv/out"))


def test_a_prepare_function_sees_what_an_ended_workload_left(fcvm_clone_factory: CloneFactory) -> None:
    clone = fcvm_clone_factory(command=_command(0, "sleep 1; "), ready="exit:0", prepare=Prepare(_look))
    assert clone.read_text("/srv/seen") == "rows\n"


def test_a_workload_may_end_in_its_clone(fcvm_clone_factory: CloneFactory) -> None:
    clone = fcvm_clone_factory(command=_command(0, "while ! [ -e /srv/go ]; do sleep 0.1; done; "), ready="agent")
    assert clone.exit_status is None
    clone.write_text("/srv/go", "")
    assert clone.wait().exit_code == 0
    assert clone.logs() == "migrated\n"
    assert clone.read_text("/srv/out") == "rows\n"


def test_a_workload_that_depends_on_others_ends_in_its_clone(fcvm_group: GroupFactory) -> None:
    reach = "use IO::Socket::INET; sleep 1 until IO::Socket::INET->new('web:80'); print qq(reached\\n); exit 4"
    migrate = {"command": ["perl", "-e", reach], "ready": "exit:4", "depends_on": ["web"]}
    group = fcvm_group({"web": {}, "migrate": migrate})
    assert group["migrate"].wait(0).exit_code == 4
    assert group["migrate"].logs() == "reached\n"
