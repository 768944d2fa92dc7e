"""The real agent as an ordinary process: in its own namespaces, on a socket, with a small root file system."""

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from itertools import count
from pathlib import Path

import pytest
from filelock import FileLock

HERE = Path(__file__).parent
TESTS = count()
PROJECT = HERE.parent.parent


def _load(name, path):
    loader = SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader.exec_module(module)
    return module


protocol = _load("fcvm_agent_test_client", HERE / "client.py")


@pytest.fixture(scope="session")
def p():
    """The independent client and the protocol's numbers."""
    return protocol


@pytest.fixture(scope="session")
def builder():
    return _load("fcvm_agent_builder", PROJECT / "guest_image" / "build")


@pytest.fixture(scope="session")
def agent_binary(builder):
    """The agent with address and undefined-behaviour sanitisers; FCVM_TEST_AGENT names another binary."""
    if given := os.environ.get("FCVM_TEST_AGENT"):
        return Path(given)
    compiler = shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        pytest.skip("no gcc or clang to build the agent with sanitisers")
    directory = PROJECT / "build" / "agent-tests"
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / "lock"):
        return builder.build_host_agent(directory, compiler, sanitize=True)


@pytest.fixture(scope="session")
def namespaces():
    """The command that starts a process in its own namespaces."""
    command = ["unshare", "--mount", "--pid", "--net", "--uts", "--fork", "--kill-child", "--mount-proc"]
    if os.geteuid() != 0:
        command[1:1] = ["--user", "--map-root-user"]
    tried = subprocess.run([*command, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"namespaces are not allowed here: {tried.stderr.strip()}")
    return command


@pytest.fixture(scope="session")
def rootfs(tmp_path_factory):
    """A root file system of busybox."""
    busybox = shutil.which("busybox")
    if not busybox:
        pytest.skip("busybox is not installed (apt-get install busybox-static)")
    root = tmp_path_factory.mktemp("agent") / "rootfs"
    for directory in ("bin", "etc", "tmp", "root", "usr/lib"):
        (root / directory).mkdir(parents=True)
    root.chmod(0o755)
    shutil.copy(busybox, root / "bin" / "busybox")
    libraries = subprocess.run(["ldd", busybox], capture_output=True, text=True)
    for word in libraries.stdout.split() if libraries.returncode == 0 else ():
        if word.startswith("/") and Path(word).is_file():
            (root / word[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(word, root / word[1:])
    for applet in subprocess.run([busybox, "--list"], capture_output=True, text=True).stdout.split():
        with contextlib.suppress(FileExistsError):
            (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:App:/home/app:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\napp:x:1001:\nextra:x:2000:other,app\nstaff:x:50:\n")
    (root / "etc/resolv.conf").symlink_to("/nowhere/resolv.conf")
    (root / "usr/lib/data").write_text("from the image\n")
    (root / "lib").symlink_to("usr/lib")
    return root


LISTEN = """
import socket, sys
channel, address, port = sys.argv[1:]
listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
if listener.family == socket.AF_INET6:
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, ONLY6)
listener.bind((address, int(port)))
listener.listen(1024)
socket.send_fds(socket.socket(fileno=int(channel)), [b"x"], [listener.fileno()])
"""

BIND_DATAGRAMS = """
import socket, sys
channel, address, port = sys.argv[1:]
service = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
service.bind((address, int(port)))
socket.send_fds(socket.socket(fileno=int(channel)), [b"x"], [service.fileno()])
"""

DIAL = """
import socket, sys
channel, address, port = sys.argv[1:]
client = socket.create_connection((address, int(port)), timeout=20)
socket.send_fds(socket.socket(fileno=int(channel)), [b"x"], [client.fileno()])
"""


class Guest:
    """One agent process, its channel, and its current session."""

    def __init__(self, command, log):
        self.channel, theirs = socket.socketpair()
        self.log = log
        with theirs, log.open("wb") as file:
            place = command.index("--channel-fd") + 1
            command[place] = str(theirs.fileno())
            options = {"ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0:exitcode=99", "LC_ALL": "C"}
            environment = {**os.environ, **options}
            # The guest's programs would inherit signals that nohup, or a shell's background job, ignores.
            command = ["env", "--default-signal", *command]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=file, env=environment)
        self.client = None

    def connect(self, secret=protocol.BOOT_SECRET):
        self.client = protocol.Client(self.channel, secret)
        return self.client

    def reconnect(self):
        return self.connect(self.client.next_secret)

    def configure(self, *more):
        fields = [(protocol.HOSTNAME, "box"), (protocol.MACHINE_ID, "0123456789abcdef" * 2), (protocol.UPPER_MIB, 256)]
        fields += [(protocol.INTERFACE, "eth0"), (protocol.MAC, b"\x02\0\0\0\0\1"), (protocol.ADDRESS, "10.0.2.15/24")]
        fields += [(protocol.GATEWAY, "10.0.2.2"), (protocol.HOSTS, "10.0.2.2 gateway"), (protocol.PEER_GATEWAY, 1)]
        self.client.call(protocol.CONFIGURE, *more, *fields)  # where a field may occur once, the first one counts
        return self.client

    def start(self, script, *more):
        argv = [(protocol.ARG, part) for part in ("sh", "-c", script)]
        return self.client.call(protocol.START, *argv, *more)

    @property
    def agent_pid(self):
        """The agent's process, the child of unshare."""
        launcher = self.process.pid
        return int(Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()[0])

    def listen(self, port, address="0.0.0.0", of=None, *, only_ipv6=False):
        """Return a listening socket in the guest's network, or in that of a process."""
        return self._open(LISTEN.replace("ONLY6", str(int(only_ipv6))), port, address, of)

    def bind_datagrams(self, port, address="0.0.0.0"):
        """Return a datagram socket in the guest's network."""
        return self._open(BIND_DATAGRAMS, port, address)

    def dial(self, port, address):
        """Return a socket that a program in the guest has connected. Raise ConnectionRefusedError."""
        return self._open(DIAL, port, address)

    def _open(self, script, port, address, of=None):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            enter = ["nsenter", "--target", str(of or self.agent_pid), "--net"]
            enter += [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
            arguments = [sys.executable, "-c", script, str(theirs.fileno()), address, str(port)]
            done = subprocess.run([*enter, *arguments], pass_fds=[theirs.fileno()], capture_output=True, text=True)
            if "ConnectionRefusedError" in done.stderr:
                raise ConnectionRefusedError(done.stderr)
            assert done.returncode == 0, done.stderr
            _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
        return socket.socket(fileno=descriptors[0])

    def close(self):
        """End the agent by ending its channel and return its exit code, which sanitisers make 99."""
        self.channel.close()
        return self.process.wait(30)


def leave_no_groups(namespaces, names):
    """Remove the agents' cgroups from the host."""
    end = namespaces.index("--pid")
    script = "mount -t cgroup2 none /mnt && cd /mnt && rmdir $0 $@"
    subprocess.run([*namespaces[:end], "sh", "-c", script, *names], capture_output=True)


@pytest.fixture
def make_guest(agent_binary, namespaces, rootfs, tmp_path):
    guests = []
    group = f"fcvm-test-{os.getpid()}-{next(TESTS)}"

    def make():
        command = [*namespaces, str(agent_binary), "--channel-fd", "?", "--root", str(rootfs)]
        command += ["--cgroup", f"{group}-{len(guests)}", "--no-reboot"]
        guests.append(Guest(command, tmp_path / f"agent-{len(guests)}.log"))
        return guests[-1]

    yield make
    codes = [guest.close() for guest in guests]
    leave_no_groups(namespaces, [f"{group}-{number}" for number in range(len(guests))])
    logs = [guest.log.read_text(errors="replace") for guest in guests]
    assert codes == [0] * len(guests), "\n".join(logs)
    assert not any("Sanitizer" in log or "runtime error" in log for log in logs), "\n".join(logs)


@pytest.fixture
def guest(make_guest):
    """A configured guest whose workload has not been started."""
    guest = make_guest()
    guest.connect()
    guest.configure()
    return guest


@pytest.fixture
def client(guest):
    return guest.client
