"""Private networks between real clones: names, isolation, faults, and servers that replicate over them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_fcvm import Clone, CloneFactory, FcvmError, GroupFactory, Network, UsageProblem, VmSpec
from pytest_fcvm.errors import EngineError
from pytest_fcvm.harness import Harness
from pytest_fcvm.host.clock import Deadline, monotonic, wait_until
from pytest_fcvm.model.parse import parse_network, parse_ready
from pytest_fcvm.options import Options
from tests.patience import PATIENCE
from tests.processes import command, descendants

pytestmark = pytest.mark.skipif(
    os.environ.get("FCVM_ENGINE", "").startswith("firecracker") and "FCVM_NETWORK" not in os.environ,
    reason="on Firecracker, private networks require FCVM_NETWORK=rootless",
)
WAIT_S = 60.0 * PATIENCE
GET = """
use IO::Socket::IP;
my $server = IO::Socket::IP->new(PeerAddr => $ARGV[0], PeerPort => 80, Timeout => 3) or die "no way: $@";
print $server "GET / HTTP/1.0\\r\\n\\r\\n";
print <$server>;
"""
PING = """
use IO::Socket::INET;
my $server = IO::Socket::INET->new(PeerAddr => "cache:6379", Timeout => 3) or die "no way: $@";
print $server "PING\\r\\n";
print scalar <$server>;
"""


def reaches(source: Clone, target: str) -> bool:
    """Return whether one clone gets the other's page."""
    result = source.exec(["perl", "-e", GET, target])
    assert result.exit_code == 0 or "no way" in result.stderr, result
    return "200 OK" in result.stdout


def test_clones_reach_each_other_by_name_and_by_address(
    fcvm_clone_factory: CloneFactory, fcvm_network: Network
) -> None:
    one, two, three = (fcvm_clone_factory(name=name, network=fcvm_network) for name in ("one", "two", "three"))
    assert reaches(one, "three")  # `three` joined after `one`
    assert reaches(three, "one")
    assert reaches(two, fcvm_network.address("one"))
    assert reaches(two, fcvm_network.address6("one"))
    assert reaches(two, "ip6-three")
    assert not reaches(two, fcvm_network.address6("four"))
    assert one.http(80).get("/").status_code == 200  # its host ports have not changed
    assert fcvm_network.names == ("one", "three", "two")


def test_a_copy_of_a_clone_joins_under_its_own_name_and_address(
    fcvm_clone_factory: CloneFactory, fcvm_network: Network
) -> None:
    one, two = (fcvm_clone_factory(name=name, network=fcvm_network) for name in ("one", "two"))
    one.succeed("echo the origin > /var/www/html/index.html")
    with one.snapshot() as copied:
        three = fcvm_clone_factory(copied, name="three", network=fcvm_network)
    one.succeed("echo changed since > /var/www/html/index.html")
    pages = {name: two.succeed(["perl", "-e", GET, name]) for name in ("one", "three")}
    assert "changed since" in pages["one"]
    assert "the origin" in pages["three"]
    assert "changed since" in three.succeed(
        ["perl", "-e", GET, "one"]
    )  # `three` does not reach itself at the origin's address
    assert reaches(three, "two")


def test_a_partition_starts_and_ends_in_the_middle_of_a_test(
    fcvm_clone_factory: CloneFactory, fcvm_network: Network, tmp_path: Path
) -> None:
    one, _ = (fcvm_clone_factory(name=name, network=fcvm_network) for name in ("one", "two"))
    with fcvm_network.capture(tmp_path / "net.pcapng") as capture:
        with fcvm_network.partition({"one"}, {"two"}):
            assert not reaches(one, "two")
        assert reaches(one, "two")
    assert b"GET / HTTP/1.0" in capture.read_bytes()
    fcvm_network.impair("two", "one", loss=1)  # requests arrive, answers do not
    assert not reaches(one, "two")
    fcvm_network.heal()
    fcvm_network.impair(latency=0.2)
    began = monotonic()
    assert reaches(one, "two")
    assert monotonic() - began >= 0.8  # the handshake and the request are two round trips


def test_a_nic_notices_that_its_link_is_down(fcvm_clone_factory: CloneFactory, fcvm_network: Network) -> None:
    one, two = (fcvm_clone_factory(name=name, network=fcvm_network) for name in ("one", "two"))
    assert one.read_text("/sys/class/net/eth1/carrier") == "1\n"
    if one.engine == "firecracker":
        with pytest.raises(EngineError, match="the NICs of VM one cannot lose their link"):
            fcvm_network.link_down("one")
        return
    with fcvm_network.link_down("one"):
        assert one.read_text("/sys/class/net/eth1/carrier") == "0\n"
        assert two.read_text("/sys/class/net/eth1/carrier") == "1\n"
        assert not reaches(two, "one")
    assert one.read_text("/sys/class/net/eth1/carrier") == "1\n"
    assert wait_until(lambda: reaches(two, "one"), Deadline(WAIT_S))


def test_tcp_reorders_frames_that_arrive_out_of_order(fcvm_clone_factory: CloneFactory, fcvm_network: Network) -> None:
    one, two = (fcvm_clone_factory(name=name, network=fcvm_network) for name in ("one", "two"))
    two.succeed("head -c 300000 /dev/urandom > /var/www/html/file")
    fcvm_network.impair(reorder=0.2)
    get = GET.replace("GET /", "GET /file")
    digest = one.succeed(f"perl -e '{get}' two | tail -c 300000 | sha256sum")
    assert digest == two.succeed("sha256sum < /var/www/html/file")
    assert fcvm_network.counters()["two", "one"].reordered > 10


@pytest.mark.skipif(not os.environ.get("FCVM_ENGINE", "").startswith("firecracker"), reason="it requires both engines")
def test_clones_of_both_engines_share_a_network(
    fcvm_clone_factory: CloneFactory, fcvm_network: Network, fcvm_spec: VmSpec, tmp_path: Path
) -> None:
    one = fcvm_clone_factory(name="one", network=fcvm_network)
    harness = Harness(Options(engine="qemu/tcg"), shared_dir=tmp_path, announce=print)
    try:
        snapshot = harness.snapshot(fcvm_spec.merged({"network": parse_network("auto")}), "both engines")
        with snapshot.clone(name="two", networks=[fcvm_network]) as two:
            assert (one.engine, two.engine) == ("firecracker", "qemu")
            for here, there in ((one, two), (two, one)):
                there.succeed("head -c 1000000 /dev/zero > /var/www/html/large")
                assert reaches(here, there.name)
                got = here.succeed(["perl", "-e", GET.replace("GET /", "GET /large"), there.name])
                assert len(got) > 1_000_000
    finally:
        harness.close()


def test_networks_are_isolated_and_a_clone_may_be_on_two(
    fcvm_clone_factory: CloneFactory, fcvm_network: Network, fcvm_network_factory: Callable[[], Network]
) -> None:
    other = fcvm_network_factory()
    inner = fcvm_clone_factory(name="inner", network=fcvm_network)
    outer = fcvm_clone_factory(name="outer", network=other)
    both = fcvm_clone_factory(name="both", network=[fcvm_network, other])
    assert reaches(both, "inner")
    assert reaches(both, "outer")
    assert reaches(outer, "both")
    assert "inner" not in outer.read_text("/etc/hosts")
    assert not reaches(outer, fcvm_network.address("inner"))
    assert reaches(inner, "both")


def test_a_reset_clone_joins_its_network_again(fcvm_clone_factory: CloneFactory, fcvm_network: Network) -> None:
    one, two = (fcvm_clone_factory(name=name, network=fcvm_network) for name in ("one", "two"))
    two.reset()
    assert wait_until(lambda: reaches(one, "two"), Deadline(WAIT_S))
    assert reaches(two, "one")
    two.close()
    assert fcvm_network.names == ("one",)


def test_replicas_survive_a_partition_from_their_primary(
    fcvm_clone_factory: CloneFactory, fcvm_network: Network, image: Callable[[str], str], fcvm_spec: VmSpec
) -> None:
    spec = fcvm_spec.merged({"image": image("redis"), "ready": parse_ready("exec:redis-cli ping")})
    db = {name: fcvm_clone_factory(spec, name=name, network=fcvm_network) for name in ("primary", "near", "far")}
    for replica in ("near", "far"):
        db[replica].succeed("redis-cli replicaof primary 6379")
        db[replica].succeed("redis-cli config set repl-timeout 5")
    db["primary"].succeed("redis-cli config set repl-ping-replica-period 1")

    def has(name: str, value: str) -> bool:
        return db[name].succeed("redis-cli get key").strip() == value

    db["primary"].succeed("redis-cli set key first")
    assert wait_until(lambda: has("near", "first") and has("far", "first"), Deadline(WAIT_S))
    with fcvm_network.partition({"primary", "near"}, {"far"}):
        db["primary"].succeed("redis-cli set key second")
        assert wait_until(lambda: has("near", "second"), Deadline(WAIT_S))
        assert has("far", "first")
    assert wait_until(lambda: has("far", "second"), Deadline(WAIT_S))


def test_clones_of_several_images_start_together(
    fcvm_group: GroupFactory, image: Callable[[str], str], fcvm_spec: VmSpec
) -> None:
    redis = fcvm_spec.merged({"image": image("redis"), "ready": parse_ready("exec:redis-cli ping")})
    ready = parse_ready(f"exec:perl -e '{PING}'")  # a base is alone, so this never succeeds there
    app = fcvm_spec.merged({"ready": ready, "depends_on": ("cache",)})
    with pytest.raises(UsageProblem, match="'app' depends on 'db', which is not in the group"):
        fcvm_group({"app": {"depends_on": "db"}})
    with pytest.raises(FcvmError, match=r"^app: .*not ready"):
        fcvm_group({"cache": fcvm_spec, "app": app.merged({"ready_timeout_s": 3.0})})
    group = fcvm_group({"app": app, "cache": redis})
    assert list(group) == ["app", "cache"]
    assert group["app"].succeed(["perl", "-e", PING]) == "+PONG\r\n"
    assert group["app"].http(80).get("/").status_code == 200
    assert group.network.names == ("app", "cache")


def test_the_frames_of_a_failed_test_are_among_its_artifacts(
    pytester: pytest.Pytester, built_image: Callable[[str], str]
) -> None:
    pytester.makepyfile(
        f"""
        GET = {GET!r}
        def test_it(fcvm_clone_factory, fcvm_network):
            one, two = (fcvm_clone_factory(name=name, network=fcvm_network) for name in ("one", "two"))
            one.succeed(["perl", "-e", GET, "two"])
            assert False

        def test_well(fcvm_network):
            pass
        """
    )
    pytester.runpytest_subprocess(f"--fcvm-image={built_image('nginx')}", "--fcvm-artifacts=failed")
    (recorded,) = pytester.path.glob("fcvm-artifacts/*/*.pcapng")
    assert "test_it" in recorded.parent.name
    assert b"GET / HTTP/1.0" in recorded.read_bytes()
    assert b"200 OK" in recorded.read_bytes()


def test_a_switch_ends_with_a_run_that_is_killed(
    pytester: pytest.Pytester, built_image: Callable[[str], str], cold_cache: Path, tmp_path: Path
) -> None:
    pytester.makepyfile(
        """
        import time
        def test_it(fcvm_clone_factory, fcvm_network):
            fcvm_clone_factory(name="one", network=fcvm_network)
            print("UP", flush=True)
            time.sleep(600)
        """
    )
    arguments = [sys.executable, "-m", "pytest", "-s", f"--fcvm-image={built_image('nginx')}"]
    run = subprocess.Popen([*arguments, f"--fcvm-cache-dir={cold_cache}"], cwd=pytester.path, stdout=subprocess.PIPE)
    assert run.stdout is not None
    with run.stdout as output:
        assert any(line.strip().endswith(b"UP") for line in output)
        (pid,) = [pid for pid in descendants(run.pid) if "network/program.py switch " in command(pid)]
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    assert wait_until(lambda: not Path(f"/proc/{pid}").exists(), Deadline(10 * PATIENCE))
