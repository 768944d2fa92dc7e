"""The client side of a helper program: start it, send it requests, end it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from typing import Any

from pytest_fcvm.errors import EngineError, HostError
from pytest_fcvm.host.files import read_tail
from pytest_fcvm.host.own import check_owner, getpid, os
from pytest_fcvm.host.supervisor.protocol import Spawner, start_program
from pytest_fcvm.network.requests import Answer, receive_answer, send_request

__all__ = ["Helper"]

_PROGRAM = Path(__file__).with_name("program.py")
_ANSWER_S = 30.0


class Helper:
    """A running helper program, which ends with this process. Every method may be called from any thread.

    `module` is the program, below `pytest_fcvm.network`. `name` is for its directory, `title` for messages. `refusal`
    makes the error for a request that failed. `undo` gets the value of an answer when the answer's owner closes. Raise
    HostError when the program cannot be started.
    """

    def __init__(
        self,
        spawner: Spawner,
        module: str,
        *arguments: str,
        name: str,
        title: str,
        refusal: Callable[[str], HostError],
        undo: Callable[[Any], object] | None = None,
    ) -> None:
        self._title, self._refusal, self._undo = title, refusal, undo
        self._owner = getpid()
        self._lock = threading.Lock()
        self._numbers = count(1)
        self._program = start_program(spawner, name, _PROGRAM, module, *arguments)
        self._program.control.settimeout(_ANSWER_S)

    @property
    def directory(self) -> Path:
        """Return the program's directory, which is removed when the program ends."""
        return self._program.log.parent

    def ask(self, operation: str, *descriptors: int, **arguments: Any) -> Any:
        """Do an operation and return the value of its answer.

        Raise EngineError when the program has ended, UsageProblem in a forked process, or what `refusal` makes.
        """
        with ExitStack() as owned:
            return self.ask_for(owned, operation, *descriptors, **arguments)[0]

    def ask_for(self, owner: ExitStack, operation: str, *descriptors: int, **arguments: Any) -> tuple[Any, list[int]]:
        """Do an operation and return the value and the descriptors of its answer, which `owner` undoes and closes."""
        check_owner(self._owner)
        with self._lock:
            number = next(self._numbers)
            try:
                send_request(self._program.control, number, operation, arguments, descriptors)
                while True:
                    with ExitStack() as received:
                        answer = self._receive(received)
                        if answer.number == number:  # else it answers a request that was interrupted
                            self._check(answer)
                            owner.push(received.pop_all())
                            return answer.value, answer.descriptors
            except OSError:
                self._program.child.kill()  # because its answer may come after the next request
                log = read_tail(self._program.log)
                raise EngineError(f"{self._title} has ended", evidence={"log": log}) from None

    def send(self, operation: str, **arguments: Any) -> None:
        """Send a request and wait for no answer. Do nothing when the program has ended."""
        with suppress(OSError):
            send_request(self._program.control, 0, operation, arguments)

    def close(self) -> None:
        """End the program. Idempotent."""
        self._program.close()

    def _receive(self, owner: ExitStack) -> Answer:
        answer = receive_answer(self._program.control)
        for descriptor in answer.descriptors:
            owner.callback(os.close, descriptor)
        if self._undo and answer.value is not None:
            owner.callback(self._undo, answer.value)
        return answer

    def _check(self, answer: Answer) -> None:
        if answer.error:
            raise self._refusal(answer.error)
        if not answer.is_whole:
            raise HostError(f"no file descriptor is left for {self._title}", hint="raise ulimit -n")
