"""Images made of Debian's packages and configured as their public ones are: ports, volumes, users, entrypoints.

Each names what it stands for. `RECIPES` are built by examples/images/build.py, `LAYERS` are single tars made here.
"""

from __future__ import annotations

import io
import runpy
import subprocess
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_BUILD = runpy.run_path(str(Path(__file__).parents[2] / "examples/images/build.py"))
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_JARS = Path(__file__).parents[2] / "build/jars"
_LONG = "/nix/store/{0}-busybox-static-x86_64-unknown-linux-musl-1.35.0-with-a-name-that-makes-its-links-long"

# hub.docker.com/_/mariadb: docker-entrypoint.sh makes the data directory, then runs the server as mysql.
_MARIADB = """\
#!/bin/sh
set -e
[ "$1" = mariadbd ] || exec "$@"
install -d -o mysql -g mysql /run/mysqld
if [ ! -d /var/lib/mysql/mysql ]; then
  [ -n "$MARIADB_ROOT_PASSWORD" ] || { echo "MARIADB_ROOT_PASSWORD is not set" >&2; exit 1; }
  chown mysql:mysql /var/lib/mysql
  mariadb-install-db --user=mysql --skip-test-db >/dev/null
  echo "ALTER USER root@localhost IDENTIFIED BY '$MARIADB_ROOT_PASSWORD';" >/tmp/init.sql
  set -- "$@" --init-file=/tmp/init.sql
fi
exec setpriv --reuid=mysql --regid=mysql --init-groups "$@"
"""
# hub.docker.com/_/rabbitmq: the node is named after the host, and runs as rabbitmq.
_RABBITMQ = """\
#!/bin/sh
set -e
chown rabbitmq:rabbitmq /var/lib/rabbitmq
exec setpriv --reuid=rabbitmq --regid=rabbitmq --init-groups /usr/lib/rabbitmq/bin/"$@"
"""
# hub.docker.com/r/apache/kafka: one node that is broker and controller, formatted at its first start.
_KAFKA = """\
#!/bin/sh
set -e
cat >/opt/kafka/config/server.properties <<END
node.id=1
process.roles=broker,controller
listeners=PLAINTEXT://:9092,CONTROLLER://:9093
advertised.listeners=PLAINTEXT://$HOSTNAME:9092
controller.listener.names=CONTROLLER
controller.quorum.voters=1@$HOSTNAME:9093
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT
log.dirs=/var/lib/kafka/data
offsets.topic.replication.factor=1
END
run() { java $KAFKA_HEAP_OPTS -cp '/opt/kafka/libs/*' "$@"; }
run kafka.tools.StorageTool format -t 5L6g3nShT-eMCtK--X86sw -c /opt/kafka/config/server.properties
exec java $KAFKA_HEAP_OPTS -cp '/opt/kafka/libs/*' kafka.Kafka /opt/kafka/config/server.properties
"""
# hub.docker.com/r/chromedp/headless-shell: the browser listens on loopback, and socat brings it out.
_CHROMIUM = """\
#!/bin/sh
socat TCP4-LISTEN:9222,fork,reuseaddr TCP4:127.0.0.1:9223 &
exec chromium --headless --no-sandbox --disable-gpu --user-data-dir=/data --remote-debugging-port=9223 about:blank
"""
# The bootstrap checks of Elasticsearch (reference, "Bootstrap Checks"), and its answer on port 9200.
_CHECKS = """\
import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.nio.file.*;
public class Node {
  static void check(boolean holds, String what) {
    if (holds) return;
    System.err.println("bootstrap check failure: " + what);
    System.exit(78);
  }
  static long limit(String name) throws Exception {
    for (String line : Files.readAllLines(Path.of("/proc/self/limits")))
      if (line.startsWith(name)) {
        String soft = line.substring(26).trim().split(" +")[0];
        return soft.equals("unlimited") ? Long.MAX_VALUE : Long.parseLong(soft);
      }
    throw new IllegalStateException(name);
  }
  public static void main(String[] words) throws Exception {
    long maps = Long.parseLong(Files.readString(Path.of("/proc/sys/vm/max_map_count")).trim());
    check(limit("Max open files") >= 65535, "max file descriptors " + limit("Max open files"));
    check(limit("Max processes") >= 4096, "max number of threads " + limit("Max processes"));
    check(limit("Max address space") == Long.MAX_VALUE, "max size virtual memory");
    check(limit("Max file size") == Long.MAX_VALUE, "max file size");
    check(maps >= 262144, "max virtual memory areas vm.max_map_count [" + maps + "]");
    HttpServer server = HttpServer.create(new InetSocketAddress(9200), 0);
    server.createContext("/", exchange -> {
      byte[] answer = "{\\"tagline\\": \\"You Know, for Search\\"}".getBytes();
      exchange.sendResponseHeaders(200, answer.length);
      exchange.getResponseBody().write(answer);
      exchange.close();
    });
    server.start();
  }
}
"""
_HAPROXY = """\
defaults
  mode http
  timeout client 30s
  timeout server 30s
  timeout connect 5s
frontend web
  bind :80
  http-request return status 200 content-type text/plain string "balanced"
"""


def _file(path: str, text: str, mode: str = "755") -> str:
    """Return a hook of mmdebstrap that writes a file."""
    return f"mkdir -p $1{Path(path).parent} && cat >$1{path} <<'END OF FILE'\n{text}END OF FILE\nchmod {mode} $1{path}"


def _java(source: str) -> tuple[str, ...]:
    return (_file("/srv/Node.java", source, "644"), "chroot $1 javac -d /srv /srv/Node.java")


def _recipe(*packages: str, hooks: Iterable[str] = (), **config: Any) -> Any:
    config["Env"] = [_PATH, *config.get("Env", ())]
    return _BUILD["Recipe"](packages=packages, config=config, hooks=tuple(hooks))


def _ports(*ports: str) -> dict[str, dict[str, str]]:
    return {port: {} for port in ports}


RECIPES: dict[str, Any] = {
    **{name: _BUILD["RECIPES"][name] for name in ("nginx", "postgres", "redis", "systemd")},
    "mariadb": _recipe(
        "mariadb-server",
        "util-linux",
        hooks=(
            "rm -rf $1/var/lib/mysql/*",
            _file("/usr/local/bin/docker-entrypoint.sh", _MARIADB),
            _file("/etc/mysql/mariadb.conf.d/99-docker.cnf", "[mariadbd]\nbind-address = 0.0.0.0\n", "644"),
        ),
        Entrypoint=["docker-entrypoint.sh"],
        Cmd=["mariadbd"],
        ExposedPorts=_ports("3306/tcp"),
        Volumes={"/var/lib/mysql": {}},
    ),
    "rabbitmq": _recipe(
        "rabbitmq-server",
        "util-linux",
        hooks=(_file("/usr/local/bin/docker-entrypoint.sh", _RABBITMQ), "rm -rf $1/var/lib/rabbitmq/*"),
        Env=["HOME=/var/lib/rabbitmq", "LANG=C.UTF-8", "RABBITMQ_LOGS=-"],
        Entrypoint=["docker-entrypoint.sh"],
        Cmd=["rabbitmq-server"],
        ExposedPorts=_ports("4369/tcp", "5671/tcp", "5672/tcp", "15691/tcp", "15692/tcp", "25672/tcp"),
        Volumes={"/var/lib/rabbitmq": {}},
    ),
    "mosquitto": _recipe(
        "mosquitto",
        hooks=(_file("/mosquitto/config/mosquitto.conf", "listener 1883\nallow_anonymous true\n", "644"),),
        Cmd=["/usr/sbin/mosquitto", "-c", "/mosquitto/config/mosquitto.conf"],
        ExposedPorts=_ports("1883/tcp"),
        Volumes={"/mosquitto/data": {}, "/mosquitto/log": {}},
    ),
    "haproxy": _recipe(
        "haproxy",
        hooks=(_file("/usr/local/etc/haproxy/haproxy.cfg", _HAPROXY, "644"),),
        Cmd=["haproxy", "-W", "-db", "-f", "/usr/local/etc/haproxy/haproxy.cfg"],
        User="haproxy",
        StopSignal="SIGUSR1",
        WorkingDir="/var/lib/haproxy",
    ),
    "kafka": _recipe(
        "openjdk-17-jre-headless",
        "passwd",
        hooks=(
            "mkdir -p $1/opt/kafka/config $1/var/lib/kafka/data && chmod 777 $1/opt/kafka/config $1/var/lib/kafka/data",
            f"cp -r '{_JARS}/kafka' $1/opt/kafka/libs",
            _file("/etc/kafka/docker/run", _KAFKA),
            "chroot $1 useradd --uid 1000 appuser",
        ),
        Env=["KAFKA_HEAP_OPTS=-Xmx1G -Xms1G"],
        Cmd=["/etc/kafka/docker/run"],
        User="appuser",
        ExposedPorts=_ports("9092/tcp"),
        Volumes={"/var/lib/kafka/data": {}, "/etc/kafka/secrets": {}, "/mnt/shared/config": {}},
    ),
    "mongo": _recipe(
        "openjdk-17-jre-headless",
        hooks=(f"cp -r '{_JARS}/mongo' $1/opt/mongo",),
        Cmd=[
            "java",
            "-Xmx128m",
            "-cp",
            "/opt/mongo/*",
            "de.bwaldvogel.mongo.InMemoryMongoServer",
            "0.0.0.0",
            "27017",
        ],
        ExposedPorts=_ports("27017/tcp"),
        Volumes={"/data/db": {}, "/data/configdb": {}},
    ),
    "elasticsearch": _recipe(
        "openjdk-17-jdk-headless",
        "passwd",
        hooks=(*_java(_CHECKS), "chroot $1 useradd --uid 1000 --gid 0 elasticsearch"),
        Cmd=["java", "-Xms128m", "-Xmx128m", "-cp", "/srv", "Node"],
        User="1000:0",
        ExposedPorts=_ports("9200/tcp", "9300/tcp"),
    ),
    "chromium": _recipe(
        "chromium",
        "socat",
        hooks=(_file("/headless-shell/run.sh", _CHROMIUM),),
        Entrypoint=["/headless-shell/run.sh"],
        ExposedPorts=_ports("9222/tcp"),
    ),
}


def _distroless() -> tuple[bytes, dict[str, Any]]:
    """Return gcr.io/distroless/static:nonroot with one static program: no shell, a user by number."""
    busybox = Path("/bin/busybox").read_bytes()
    layer = _tar(
        ("etc", None, {}),
        ("etc/passwd", b"root:x:0:0:root:/root:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/home/nonroot:/x\n", {}),
        ("home/nonroot/index.html", b"static\n", {}),
        ("busybox", busybox, {"mode": 0o755}),
    )
    command = ["/busybox", "httpd", "-f", "-p", "8080", "-h", "/home/nonroot"]
    config = {"Entrypoint": command, "User": "65532", "WorkingDir": "/home/nonroot", "ExposedPorts": _ports("8080/tcp")}
    return layer, config


def _nix() -> tuple[bytes, dict[str, Any]]:
    """Return what dockerTools.buildLayeredImage makes: the store, absolute names, long absolute links, epoch 1."""
    store = _LONG.format("a" * 32)
    layer = _tar(
        (f"{store}/bin/busybox", Path("/bin/busybox").read_bytes(), {"mode": 0o555}),
        (f"{store}/bin/httpd", b"", {"type": tarfile.SYMTYPE, "linkname": f"{store}/bin/busybox"}),
        ("/bin", b"", {"type": tarfile.SYMTYPE, "linkname": f"{store}/bin"}),
        ("/srv/index.html", b"nix\n", {"mode": 0o444}),
        mtime=1,
    )
    command = [f"{store}/bin/httpd", "-f", "-p", "8080", "-h", "/srv"]
    return layer, {"Cmd": command, "ExposedPorts": _ports("8080/tcp")}


def _kaniko() -> tuple[bytes, dict[str, Any]]:
    """Return what kaniko makes: names that begin with a slash, hard links to such names, the root itself a member."""
    busybox = Path("/bin/busybox").read_bytes()
    layer = _tar(
        ("/", None, {}),
        ("/bin/busybox", busybox, {"mode": 0o755}),
        ("/bin/httpd", b"", {"type": tarfile.LNKTYPE, "linkname": "/bin/busybox"}),
        ("/bin/sh", b"", {"type": tarfile.LNKTYPE, "linkname": "/bin/busybox"}),
        ("/workspace/index.html", b"kaniko\n", {}),
    )
    return layer, {
        "Cmd": ["httpd", "-f", "-p", "8080"],
        "Env": [_PATH],
        "WorkingDir": "/workspace",
        "ExposedPorts": _ports("8080/tcp"),
    }


LAYERS: dict[str, Callable[[], tuple[bytes, dict[str, Any]]]] = {
    "distroless": _distroless,
    "nix": _nix,
    "kaniko": _kaniko,
}
# Coordinates in Maven's central repository; their dependencies come along.
_ARTIFACTS = {
    "kafka": ("org.apache.kafka", "kafka_2.13", "3.7.2"),
    "mongo": ("de.bwaldvogel", "mongo-java-server", "1.46.0"),
}
_POM = """\
<project><modelVersion>4.0.0</modelVersion><groupId>x</groupId><artifactId>x</artifactId><version>1</version>
<dependencies><dependency><groupId>{0}</groupId><artifactId>{1}</artifactId><version>{2}</version></dependency>
</dependencies></project>
"""


def build(name: str, directory: Path) -> str:
    """Build an image in a directory, unless it is there. Return the reference of its OCI layout."""
    if name in LAYERS:
        layout = directory / name
        (layout / "blobs/sha256").mkdir(parents=True, exist_ok=True)
        _BUILD["write_layout"](layout, *LAYERS[name]())
    else:
        _fetch_jars(name)
        layout = _BUILD["build"](name, directory, RECIPES[name])
    return f"oci:{layout}:latest"


def _fetch_jars(name: str) -> None:
    target = _JARS / name
    if name not in _ARTIFACTS or target.exists():
        return
    pom = _JARS / f"{name}.xml"
    pom.parent.mkdir(parents=True, exist_ok=True)
    pom.write_text(_POM.format(*_ARTIFACTS[name]))
    fresh = target.with_suffix(".tmp")
    plugin = "org.apache.maven.plugins:maven-dependency-plugin:3.6.0:copy-dependencies"
    command = ["mvn", "--quiet", "--batch-mode", "--file", pom, plugin, f"-DoutputDirectory={fresh}"]
    subprocess.run([*command, "-DincludeScope=runtime"], check=True)
    fresh.rename(target)


def _tar(*members: tuple[str, bytes | None, dict[str, Any]], mtime: int = 1_700_000_000) -> bytes:
    """Return a tar of (name, content, more); content None is a directory. Names are written as they are."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content, more in members:
            info = tarfile.TarInfo(name)
            info.mtime, info.mode = mtime, 0o755 if content is None else 0o644
            info.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            info.size = len(content or b"")
            for key, value in more.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content or b""))
    return out.getvalue()
