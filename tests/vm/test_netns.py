"""Clones in network namespaces: ports, egress and none, isolation from each other, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_fcvm import Clone, CloneFactory, VmSpec
from pytest_fcvm.errors import UsageProblem
from pytest_fcvm.host import own
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.model.parse import parse_network, parse_ready
from tests.patience import PATIENCE
from tests.processes import children, command, descendants

ROOT = Path(__file__).parents[2]
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
MODES = ("rootless", "bridge")
OUTSIDE, OTHER, HOST = "192.0.2.2", "192.0.2.3", "192.0.2.1"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a test host with its own networks requires root")
needs_tools = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("nft", "slirp4netns", "ip")),
    reason="egress requires nftables, slirp4netns and iproute2",
)

# One network namespace is the host of a pytest, another one is outside. Servers print the peer that they see.
HOST_SCRIPT = f"""
set -e
server='
import socketserver, sys, threading
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        self.rfile.readline()
        self.wfile.write((sys.argv[1] + " sees " + self.client_address[0]).encode())
class Names(socketserver.BaseRequestHandler):
    def handle(self):  # answers every query with one address (RFC 1035, section 4)
        asked, answer = self.request
        end = asked.index(bytes(1), 12) + 5
        found = asked[end - 3] == 1
        head = asked[:2] + bytes([0x81, 0x80, 0, 1, 0, found, 0, 0, 0, 0]) + asked[12:end]
        rest = bytes([0xC0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 3]) if found else b""
        answer.sendto(head + rest, self.client_address)
names = socketserver.ThreadingUDPServer(("0.0.0.0", 53), Names)
threading.Thread(target=names.serve_forever, daemon=True).start()
socketserver.ThreadingTCPServer(("0.0.0.0", 7000), Handler).serve_forever()'
echo "nameserver {OUTSIDE}" > resolv.conf
mount --bind resolv.conf /etc/resolv.conf
echo 1 > /proc/sys/net/ipv4/ip_forward
ip link set lo up
ip link add near type veth peer name far
unshare -n "$1" -c "$server" outside >/dev/null & outside=$!
while [ "$(readlink /proc/$outside/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link set far netns $outside
ip addr add {HOST}/24 dev near
ip link set near up
nsenter -t $outside -n sh -c 'ip link set lo up; ip link set far up; for a in {OUTSIDE} {OTHER}; do
    ip addr add $a/24 dev far; done'
"$1" -c "$server" host >/dev/null & host=$!
trap 'kill $outside $host' EXIT
set +e
"$@"
code=$?
sleep 1.5
echo "LEFT $(ip -o link | cut -d: -f2 | tr -d '\\n') ; $(nft list tables)"
exit $code
"""


def status(clone: Clone) -> int:
    with OPENER.open(clone.url(80), timeout=60) as answer:
        return int(answer.status)


@pytest.mark.parametrize("mode", MODES)
def test_ports_reach_the_guest_through_its_nic(fcvm_clone_factory: CloneFactory, fcvm_spec: VmSpec, mode: str) -> None:
    if mode == "bridge" and os.geteuid() != 0:
        pytest.skip("the network bridge requires root")
    spec = fcvm_spec.merged({"network": parse_network(mode)})
    one, other = fcvm_clone_factory(spec), fcvm_clone_factory(spec)
    assert [status(clone) for clone in (one, other)] == [200, 200]
    # The guest sees a peer on its own network, and resets connections to a port without a listener.
    one.wait_for_log(r'10\.0\.2\.2 - - .*"GET / ', timeout=60)
    with socket.create_connection(one.endpoint(4999), timeout=60) as connection, pytest.raises(ConnectionError):
        connection.recv(1)


def test_datagrams_arrive_whole_both_ways(fcvm_clone_factory: CloneFactory, fcvm_spec: VmSpec) -> None:
    clone = fcvm_clone_factory(fcvm_spec.merged({"network": parse_network("rootless")}))
    echo = """
        use IO::Socket::INET;
        my $s = IO::Socket::INET->new(LocalPort => 5300, Proto => "udp") or die $@;
        syswrite STDOUT, "up\\n";
        while (defined(my $from = $s->recv(my $data, 65535))) { $s->send(scalar reverse($data), 0, $from) }
    """
    with clone.popen(["/usr/bin/perl", "-e", echo]) as server:
        assert server.stdout.read1() == b"up\n"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(60)
            client.connect(clone.endpoint(5300, "udp"))
            for data in (b"abc", b"", bytes(range(250)) * 100):
                client.send(data)
                assert client.recv(65535) == data[::-1]


def test_other_networks_are_refused_at_once_without_egress(fcvm_clone_factory: CloneFactory, fcvm_spec: VmSpec) -> None:
    clone = fcvm_clone_factory(fcvm_spec.merged({"network": parse_network("rootless")}))
    tried = clone.exec(["/bin/bash", "-c", f"exec 3<>/dev/tcp/{OUTSIDE}/7000"], timeout=60)
    assert tried.exit_code == 1
    assert "No route to host" in tried.stderr


def test_the_network_user_does_not_support_allow(fcvm_clone_factory: CloneFactory, fcvm_spec: VmSpec) -> None:
    with pytest.raises(UsageProblem, match="does not support the network 'user,egress,allow="):
        fcvm_clone_factory(fcvm_spec.merged({"network": parse_network("user,allow=10.0.0.0/8")}))


def test_the_workload_and_commands_get_the_proxy_variables(
    fcvm_clone_factory: CloneFactory,
    fcvm_spec: VmSpec,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setenv("https_proxy", "http://host.fcvm:3128")
    monkeypatch.setenv("NO_PROXY", "example.org")
    request.addfinalizer(own.capture_environment())  # as in a run that started with these
    changes = {"command": ("sh", "-c", "env; echo done; exec sleep infinity"), "ready": parse_ready("log:done")}
    clone = fcvm_clone_factory(fcvm_spec.merged({"network": parse_network("auto,proxy"), **changes}))
    for environment in (clone.logs(), clone.succeed("env")):
        assert "https_proxy=http://host.fcvm:3128\n" in environment
        assert "NO_PROXY=example.org\n" in environment


@needs_tools
def test_a_run_reports_its_network_when_it_is_not_the_engines_first(
    pytester: pytest.Pytester, built_image: Callable[[str], str]
) -> None:
    pytester.makepyfile("def test_it(fcvm_clone): fcvm_clone.succeed('true')")
    arguments = [f"--fcvm-image={built_image('nginx')}", "--fcvm-network=auto,allow=10.0.0.0/8"]
    result = pytester.runpytest_subprocess(*arguments)
    result.assert_outcomes(passed=1)
    engine = "firecracker" if os.environ.get("FCVM_ENGINE", "").startswith("firecracker") else "qemu"
    allowed = "egress,allow=10.0.0.0/8"
    result.stdout.fnmatch_lines([f"fcvm: the network auto,{allowed} is rootless,{allowed} on {engine}"])


INNER = f"""
    import os, subprocess, time

    TRY = "exec 3<>/dev/tcp/%s/7000 && echo >&3 && cat <&3"

    def ask(clone, address):
        return clone.exec(["/bin/bash", "-c", TRY % address], timeout=60).stdout

    def test_ways(fcvm_clone_factory):
        one, other = fcvm_clone_factory(), fcvm_clone_factory()
        mode = os.environ["FCVM_NETWORK"]
        assert ask(one, "{OTHER}") == "outside sees {HOST}"
        assert ask(one, "{OUTSIDE}") == ("" if "allow" in mode else "outside sees {HOST}")
        assert one.succeed("getent ahostsv4 some.example").split()[0] == "{OTHER}"
        if "bridge" in mode:
            assert ask(one, "{HOST}") == ""  # the host's own services require a host_port
            routes = subprocess.run(["ip", "route"], capture_output=True, text=True, check=True).stdout
            ends = [line.split()[0] for line in routes.splitlines() if line.startswith("10.211.")]
            answers = [one.exec(["/bin/bash", "-c", f"exec 3<>/dev/tcp/{{end}}/80"]).stderr for end in ends]
            assert len(answers) >= 2
            # The clone's own end refuses. The ends of others would refuse too, if a connection could reach them.
            assert sum("No route to host" in answer for answer in answers) == len(answers) - 1
        if os.environ.get("STAY"):
            print("UP", flush=True)
            time.sleep(600)
"""


@pytest.fixture
def on_a_host(tmp_path: Path, built_image: Callable[[str], str]) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a pytest in a network namespace that serves as a host, with another one outside."""
    (tmp_path / "test_inner.py").write_text(textwrap.dedent(INNER))
    (tmp_path / "host.sh").write_text(HOST_SCRIPT)
    started: list[subprocess.Popen[str]] = []

    def start(network: str, **more: str) -> subprocess.Popen[str]:
        settings = {
            "FCVM_NETWORK": network,
            "FCVM_IMAGE": built_image("nginx"),
            "FCVM_POOL": "0",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        pytest_command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-s", "-q", "test_inner.py"]
        arguments = ["unshare", "-n", "-m", "bash", str(tmp_path / "host.sh"), *pytest_command]
        process = subprocess.Popen(
            arguments,
            cwd=tmp_path,
            env=os.environ | settings | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with process:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@needs_root
@needs_tools
@pytest.mark.parametrize("ways", ["egress", f"allow={OTHER}"])
@pytest.mark.parametrize("mode", MODES)
def test_clones_reach_what_egress_allows_and_not_each_other(
    on_a_host: Callable[..., subprocess.Popen[str]], mode: str, ways: str
) -> None:
    output, _ = on_a_host(f"{mode},{ways}").communicate(timeout=240 * PATIENCE)
    assert "1 passed" in output, output
    assert "LEFT  lo near@if2 ; \n" in output, output


@needs_root
@needs_tools
@pytest.mark.parametrize("mode", MODES)
def test_a_killed_pytest_leaves_nothing(on_a_host: Callable[..., subprocess.Popen[str]], mode: str) -> None:
    process = on_a_host(f"{mode},egress", STAY="1")
    assert process.stdout is not None
    lines: list[str] = []
    up = threading.Event()

    def read() -> None:
        for line in process.stdout or ():
            lines.append(line)
            if line.strip().endswith("UP"):
                up.set()
        up.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert up.wait(240 * PATIENCE)
    assert process.poll() is None, "".join(lines)
    (victim,) = [pid for pid in children(process.pid) if "test_inner.py" in command(pid)]
    alive = descendants(victim)
    assert any("qemu" in command(pid) or "firecracker" in command(pid) for pid in alive)
    os.kill(victim, signal.SIGKILL)
    reader.join(60)
    assert "LEFT  lo near@if2 ; \n" in "".join(lines), "".join(lines)
    assert wait_until(lambda: not [pid for pid in alive if command(pid)], Deadline(30 * PATIENCE)), json.dumps(
        [command(pid) for pid in alive]
    )
