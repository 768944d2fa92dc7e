"""The agent's verbs and streams against the fake agent."""

from __future__ import annotations

from pytest_fcvm.guest.agent import Agent
from pytest_fcvm.model.guest import ProcessSpec


def test_a_program_gets_its_input_and_gives_its_output(agent: Agent) -> None:
    with agent.exec(ProcessSpec(argv=("cat",))) as process:
        out, err = process.communicate(b"hello", timeout_s=10)
    assert (out, err, process.wait(1).code) == (b"hello", b"", 0)
