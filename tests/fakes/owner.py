"""A process that owns a supervisor, for tests that kill it: `owner.py RUN_DIR ISOLATION PHASE`. It prints JSON lines.

PHASE `started` only reports that the guard is exec'd; `burst` spawns without end in four threads; `serving` starts
children with descendants that leave their process group or lose their parent, and runs the commands on stdin.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

from pytest_fcvm.host.paths import RunDir
from pytest_fcvm.host.supervisor.supervisor import Child, Supervisor

# A process in the same group, one in a session of its own, and one whose parent has ended.
FAMILY = "sleep 600 & setsid sleep 600 & (sleep 600 & exec true); exec sleep 600"


def main() -> None:
    root, isolation, phase = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    run = RunDir(root).__enter__()
    supervisor = Supervisor.start(run.path, namespaces=isolation == "namespace")
    say(run=str(run.path), guard=supervisor.guard_pid)
    if phase == "burst":
        burst(supervisor)
    elif phase == "serving":
        serve(supervisor)
    while True:
        time.sleep(60)


def burst(supervisor: Supervisor) -> None:
    def spawn_forever() -> None:
        for number in range(1_000_000):
            supervisor.spawn(["sleep", "600"], name="burst", stdout=Path("log"))
            say(spawned=number)

    for _ in range(4):
        threading.Thread(target=spawn_forever, daemon=True).start()


def serve(supervisor: Supervisor) -> None:
    family = [spawn_family(supervisor) for _ in range(3)]
    say(isolation=supervisor.isolation, children=[child.pid for child in family])
    for line in sys.stdin:
        ask(line.strip(), supervisor, family)


def spawn_family(supervisor: Supervisor) -> Child:
    return supervisor.spawn(
        ["/bin/sh", "-c", FAMILY], name="family", stdout=Path("log"), owned_dir=supervisor.make_dir("family")
    )


def ask(question: str, supervisor: Supervisor, family: list[Child]) -> None:
    if question == "fork":
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
        say(forked=pid)
    elif question == "close in a fork":
        pid = os.fork()
        if pid == 0:
            for child in family:
                child.kill()
            supervisor.close()
            os._exit(0)
        os.waitpid(pid, 0)
        say(running=[child.exited is None for child in family])
    elif question == "spawn":
        child = supervisor.spawn(["true"], name="true", stdout=Path("log"))
        say(exit=child.wait(5).code, running=[child.exited is None for child in family])
    elif question == "wait":
        say(signals=[child.wait(5).signal for child in family])


def say(**what: object) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    main()
