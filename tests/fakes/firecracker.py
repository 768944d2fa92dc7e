"""A program that behaves as Firecracker 1.16.1 does: its API, its files, its vsock socket, its ways to end.

    firecracker.py VERSION [firecracker's own arguments]

The guest listens on vsock port 1024 and answers each line `ping X` with `pong X`. `panic`, `reboot` and `exit N` end
it. A kernel is a file with the magic of ELF. For a kernel with the words "no kvm", /dev/kvm cannot be opened.
tests/firecracker compares the fake with the real program, request by request.
"""

from __future__ import annotations

import fcntl
import http.server
import itertools
import json
import os
import re
import socket
import socketserver
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_ELF_HEADER = 64
_IFNAMSIZ, _TUNSETIFF, _TAP_FLAGS = 16, 0x400454CA, 0x5002  # a tap without packet information, with virtio's headers
MAGIC, AGENT_PORT = "fake device state", 1024
_UNSUPPORTED = "The requested operation is not supported {} starting the microVM."
_PREFIX = "Load snapshot error: Failed to restore from snapshot: "
_KVM = (
    "Kvm error: Error creating KVM object: Permission denied (os error 13) Make sure the user launching the "
    "firecracker process is \\\nconfigured on the /dev/kvm file's ACL."
)
_OF_THE_JAILER = ("--start-time-us", "--start-time-cpu-us", "--parent-cpu-time-us")
# The fields of each call, in the order in which the real Firecracker lists them.
_FIELDS = {
    "/actions": ("action_type",),
    "/balloon": (
        "amount_mib",
        "deflate_on_oom",
        "stats_polling_interval_s",
        "free_page_hinting",
        "free_page_reporting",
    ),
    "/boot-source": ("boot_args", "initrd_path", "kernel_image_path"),
    "/drives": (
        "drive_id",
        "partuuid",
        "is_root_device",
        "cache_type",
        "is_read_only",
        "path_on_host",
        "rate_limiter",
        "io_engine",
        "socket",
    ),
    "/entropy": ("rate_limiter",),
    "/machine-config": ("vcpu_count", "mem_size_mib", "smt", "cpu_template", "track_dirty_pages", "huge_pages"),
    "/mmds/config": ("version", "network_interfaces", "ipv4_address", "imds_compat"),
    "/network-interfaces": (
        "iface_id",
        "host_dev_name",
        "guest_mac",
        "mtu",
        "rx_rate_limiter",
        "tx_rate_limiter",
    ),
    "/serial": ("serial_out_path", "rate_limiter"),
    "/snapshot/create": ("snapshot_type", "snapshot_path", "mem_file_path"),
    "/snapshot/load": (
        "snapshot_path",
        "mem_file_path",
        "mem_backend",
        "enable_diff_snapshots",
        "track_dirty_pages",
        "resume_vm",
        "network_overrides",
        "vsock_override",
        "clock_realtime",
    ),
    "/vm": ("state",),
    "/vsock": ("guest_cid", "uds_path", "vsock_id"),
}


class Refusal(Exception):
    """A call gets the answer 400. With `fatal` the program ends."""

    def __init__(self, text: str, *, fatal: bool = False) -> None:
        super().__init__(text)
        self.fatal = fatal


class RunningVm:
    """The state behind the API."""

    def __init__(self, identifier: str, version: str) -> None:
        self.id, self.version = identifier, version
        self.state = "Not started"
        self.config: dict[str, Any] = {"machine-config": {"vcpu_count": 1, "mem_size_mib": 128}, "drives": {}}
        self.console = sys.stdout
        self._taps: list[int] = []
        self.metadata: Any = {}
        self.metrics = "/dev/null"
        self.latencies = {"load_snapshot": 0, "pause_vm": 0}
        self._hangs = self._must_reset = False
        self._ports = itertools.count(1 << 30)

    # calls

    def describe(self) -> dict[str, str]:
        return {"id": self.id, "state": self.state, "vmm_version": self.version, "app_name": "Firecracker"}

    def put_serial(self, body: Mapping[str, Any]) -> None:
        self._before_start()
        self.console = Path(body["serial_out_path"]).open("w")  # noqa: SIM115  it is the guest's for good

    def put_boot_source(self, body: Mapping[str, Any]) -> None:
        self._before_start()
        if not Path(body["kernel_image_path"]).exists():
            raise Refusal("Boot source error: The kernel file cannot be opened: No such file or directory (os error 2)")
        self.config["boot-source"] = dict(body)

    def put_machine_config(self, body: Mapping[str, Any]) -> None:
        self._before_start()
        if not 1 <= body["vcpu_count"] <= 32:
            raise Refusal(
                "Machine config error: The number of vCPUs must be greater than 0, less than 32 and must be 1 or an "
                "even number if SMT is enabled."
            )
        if body["mem_size_mib"] <= 0:
            raise Refusal(
                "Machine config error: The memory size (MiB) is either 0, or not a multiple of the configured "
                "page size."
            )
        self.config["machine-config"] = dict(body)

    def put_drive(self, body: Mapping[str, Any]) -> None:
        self._before_start()
        self.config["drives"][body["drive_id"]] = dict(body)
        if not Path(body["path_on_host"]).exists():
            raise Refusal(
                "Drive config error: Unable to create the virtio block device: Virtio backend error: Error "
                f"manipulating the backing file: No such file or directory (os error 2) {body['path_on_host']}"
            )

    def put_network_interface(self, body: Mapping[str, Any]) -> None:
        self._before_start()
        name = body["host_dev_name"]
        try:
            self._taps.append(_open_tap(name))
        except OSError as error:
            failed = "Network config error: Could not create the network device"
            raise Refusal(f"{failed}: {_tap_refusal(name, error)}") from None
        self.config.setdefault("network-interfaces", {})[body["iface_id"]] = dict(body)

    def put_vsock(self, body: Mapping[str, Any]) -> None:
        self._before_start()
        self.config["vsock"] = dict(body)

    def put_entropy(self, body: Mapping[str, Any]) -> None:
        self._before_start()
        self.config["entropy"] = dict(body)

    def put_balloon(self, body: Mapping[str, Any]) -> None:
        self._before_start()
        if body["amount_mib"] > self.config["machine-config"]["mem_size_mib"]:
            raise Refusal("Balloon config error: Amount of pages requested is too large.")
        more = {"free_page_hinting": False, "free_page_reporting": False}
        self.config["balloon"] = {"stats_polling_interval_s": 0, **more, **body}

    def get_balloon(self) -> dict[str, Any]:
        if "balloon" not in self.config:
            raise Refusal("Balloon config error: No balloon device found.")
        found: dict[str, Any] = self.config["balloon"]
        return found

    def patch_balloon(self, body: Mapping[str, Any]) -> None:
        self._after_start()
        self.get_balloon()["amount_mib"] = body["amount_mib"]

    def balloon_statistics(self) -> dict[str, Any]:
        """Return the statistics of a guest that gives all the memory that it is asked for."""
        self._after_start()
        size = self.get_balloon()["amount_mib"]
        return {"target_pages": size << 8, "actual_pages": size << 8, "target_mib": size, "actual_mib": size}

    def put_mmds(self, body: Any) -> None:
        self.metadata = body

    def put_mmds_config(self, body: Mapping[str, Any]) -> None:
        self._before_start()
        failed = "MMMDS config error: The list of network interface IDs"
        if not body["network_interfaces"]:
            raise Refusal(f"{failed} that allow forwarding MMDS requests is empty.")
        if not set(body["network_interfaces"]) <= set(self.config.get("network-interfaces", {})):
            raise Refusal(
                f"{failed} provided contains at least one ID that does not correspond to any existing network "
                "interface."
            )
        self.config["mmds-config"] = dict(body)

    def put_action(self, body: Mapping[str, Any]) -> None:
        if body["action_type"] == "FlushMetrics":
            self._after_start()
            with Path(self.metrics).open("a") as file:
                file.write(json.dumps({"latencies_us": self.latencies}) + "\n")
        if body["action_type"] != "InstanceStart":
            return
        self._before_start()
        if "boot-source" not in self.config:
            raise Refusal("Start microvm error: Cannot start microvm without kernel configuration.")
        kernel = Path(self.config["boot-source"]["kernel_image_path"]).read_bytes()
        if b"no kvm" in kernel:
            raise Refusal(f"Start microvm error: {_KVM}")
        if not kernel.startswith(b"\x7fELF"):
            reason = "Invalid Elf magic number" if len(kernel) >= _ELF_HEADER else "Unable to read elf header"
            raise Refusal(
                "Start microvm error: System configuration error: Cannot load kernel due to invalid memory "
                "configuration or invalid kernel image: Kernel Loader: failed to load ELF kernel image: Kernel Loader: "
                f"{reason}"
            )
        self._print("[    0.000000] Linux version 6.12")
        self._run()

    def patch_vm(self, body: Mapping[str, Any]) -> None:
        self._after_start()
        if body["state"] not in ("Paused", "Resumed"):
            raise Refusal(
                "An error occurred when deserializing the json body of a request: unknown variant "
                f"`{body['state']}`, expected `Paused` or `Resumed` at line 1 column {len(_compact(body)) - 1}."
            )
        if body["state"] == "Paused":
            self.state = "Paused"
        elif self.state == "Paused":
            self._hangs = not self._must_reset and self.version in ("1.16.0", "1.16.1")  # issue 6100
            self._must_reset = False
            self.state = "Running"

    def create_snapshot(self, body: Mapping[str, Any]) -> None:
        self._after_start()
        if self.state != "Paused":
            raise Refusal(
                "Create snapshot error: Cannot save the microVM state: Operation not allowed: save/restore unavailable "
                "while running"
            )
        for name, what in (("snapshot_path", "snapshot"), ("mem_file_path", "memory")):
            if not Path(body[name]).parent.is_dir():
                raise Refusal(
                    f"Create snapshot error: Cannot perform open on the {what} backing file: No such file or directory "
                    "(os error 2)"
                )
        Path(body["snapshot_path"]).write_text(json.dumps({"magic": MAGIC, "config": self.config}))
        size, memory = self.config["machine-config"]["mem_size_mib"] << 20, Path(body["mem_file_path"])
        if body.get("snapshot_type") == "Diff":  # over an existing file of the right size
            with memory.open("ab") as file:
                file.truncate(0 if file.tell() != size else size)
                file.truncate(size)
        else:
            memory.write_bytes(b"\0" * size)
        self._must_reset = True

    def load_snapshot(self, body: Mapping[str, Any]) -> None:
        self._before_start()
        if "boot-source" in self.config or self.config["drives"]:
            raise Refusal(
                "Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources."
            )
        try:
            text = Path(body["snapshot_path"]).read_text()
            self.config = json.loads(text)["config"]
        except OSError as error:
            raise Refusal(
                f"{_PREFIX}Failed to get snapshot state from file: Failed to open snapshot file: {error.strerror} "
                f"(os error {error.errno})",
                fatal=True,
            ) from None
        except (ValueError, LookupError):
            reason = "An error occurred during bitcode serialization: bitcode error"
            raise Refusal(
                f"{_PREFIX}Failed to get snapshot state from file: Failed to load snapshot state from file: "
                f"{reason if text else 'IO Error: File too short to contain CRC'}",
                fatal=True,
            ) from None
        self._check_memory(Path(body["mem_backend"]["backend_path"]))
        self.latencies["load_snapshot"] = 1250
        for drive in self.config["drives"].values():
            if not Path(drive["path_on_host"]).exists():
                raise Refusal(
                    f"{_PREFIX}Failed to build microVM from snapshot: Failed to restore devices: Error restoring MMIO "
                    "devices: Block: Virtio backend error: Error manipulating the backing file: No such file or "
                    f"directory (os error 2) {drive['path_on_host']}",
                    fatal=True,
                )
        for interface in self.config.get("network-interfaces", {}).values():
            name = interface["host_dev_name"]
            try:
                self._taps.append(_open_tap(name))
            except OSError as error:
                raise Refusal(
                    f"{_PREFIX}Failed to build microVM from snapshot: Failed to restore devices: Error restoring MMIO "
                    f"devices: Net: Failed to create a network device: {_tap_refusal(name, error)}",
                    fatal=True,
                ) from None
        if body.get("resume_vm"):
            self._run()
        else:
            self.state = "Paused"

    # the guest

    def _check_memory(self, path: Path) -> None:
        failed = f"{_PREFIX}Failed to load guest memory: Error creating guest memory from file: Failed to "
        if not path.exists():
            raise Refusal(f"{failed}load guest memory: No such file or directory (os error 2)", fatal=True)
        if path.stat().st_size < self.config["machine-config"]["mem_size_mib"] << 20:
            text = "restore guest memory: Total sum of memory regions exceeds largest possible file offset"
            raise Refusal(failed + text, fatal=True)

    def _before_start(self) -> None:
        if self.state != "Not started":
            raise Refusal(_UNSUPPORTED.format("after"))

    def _after_start(self) -> None:
        if self.state == "Not started":
            raise Refusal(_UNSUPPORTED.format("before"))

    def _run(self) -> None:
        self.state = "Running"
        if "vsock" in self.config:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(self.config["vsock"]["uds_path"])
            listener.listen(1023)
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            threading.Thread(target=self._serve, args=(listener.accept()[0],), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, client.makefile("rwb") as stream:
            asked = re.fullmatch(rb"connect +(\d+)\s*\n", stream.readline(32), re.IGNORECASE)
            if not asked or int(asked[1]) != AGENT_PORT:
                return
            if self.state == "Paused" or self._hangs:
                threading.Event().wait()
            stream.write(b"OK %d\n" % next(self._ports))
            stream.flush()
            for line in stream:
                self._apply(line.decode().split())
                stream.write(b"pong" + line[4:])
                stream.flush()

    def _apply(self, words: list[str]) -> None:
        if words[0] == "panic":
            self._print("[    1.000000] Kernel panic - not syncing: sysrq triggered crash")
        if words[0] in ("panic", "reboot"):
            _leave(0)
        if words[0] == "exit":
            _leave(int(words[1]))

    def _print(self, text: str) -> None:
        print(text, file=self.console, flush=True)


def _open_tap(name: str) -> int:
    """Open a tap device by name, as the real Firecracker does. Create it where that is allowed. Raise OSError."""
    if len(name) >= _IFNAMSIZ:
        raise OSError(0, "Invalid interface name")
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP_FLAGS))
    except OSError:
        os.close(tap)
        raise
    return tap


def _tap_refusal(name: str, error: OSError) -> str:
    if not error.errno:
        return f"Open tap device failed: {error.strerror}"
    return (
        f"Open tap device failed: Error while creating ifreq structure: {error.strerror} (os error {error.errno}). "
        f"Invalid TUN/TAP Backend provided by {name}. Check our documentation on setting up the network devices."
    )


def _compact(body: Mapping[str, Any]) -> str:
    return json.dumps(body, separators=(",", ":"))


def _leave(code: int) -> None:
    how = "successfully" if code == 0 else "with error"
    print(f"2026-11-28T10:00:00.000000000 [fake:main] Firecracker exiting {how}. exit_code={code}", flush=True)
    os._exit(code)


def _routes(running: RunningVm) -> dict[tuple[str, str], Callable[..., Any]]:
    return {
        ("GET", "/"): running.describe,
        ("GET", "/version"): lambda: {"firecracker_version": running.version},
        ("GET", "/vm/config"): lambda: running.config,
        ("PUT", "/actions"): running.put_action,
        ("PUT", "/balloon"): running.put_balloon,
        ("GET", "/balloon"): running.get_balloon,
        ("PATCH", "/balloon"): running.patch_balloon,
        ("GET", "/balloon/statistics"): running.balloon_statistics,
        ("PUT", "/boot-source"): running.put_boot_source,
        ("PUT", "/drives"): running.put_drive,
        ("PUT", "/entropy"): running.put_entropy,
        ("PUT", "/machine-config"): running.put_machine_config,
        ("GET", "/mmds"): lambda: running.metadata,
        ("PUT", "/mmds"): running.put_mmds,
        ("PUT", "/mmds/config"): running.put_mmds_config,
        ("PUT", "/network-interfaces"): running.put_network_interface,
        ("PUT", "/serial"): running.put_serial,
        ("PUT", "/snapshot/create"): running.create_snapshot,
        ("PUT", "/snapshot/load"): running.load_snapshot,
        ("PATCH", "/vm"): running.patch_vm,
        ("PUT", "/vsock"): running.put_vsock,
    }


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "Firecracker API", ""
    routes: Mapping[tuple[str, str], Callable[..., Any]] = {}
    one_at_a_time = threading.Lock()

    def do_GET(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_PATCH(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fatal = False
        try:
            with self.one_at_a_time:
                said = self._call(data)
        except Refusal as refusal:
            fatal = refusal.fatal
            self._reply(400, {"fault_message": str(refusal)})
        else:
            self._reply(200 if said is not None else 204, said)
        if fatal:
            print("Error: RunWithApi(BuildMicroVmError(Restore))", file=sys.stderr, flush=True)
            _leave(1)

    def _call(self, data: bytes) -> Any:
        path = re.sub("^(/drives|/network-interfaces)/.*", r"\1", self.path)
        route = self.routes.get((self.command, path))
        if route is None:
            raise Refusal(f"Invalid request method and/or path: {self.command} {self.path.lstrip('/')}.")
        if self.command == "GET":
            return route()
        body = json.loads(data)
        for name in body if path != "/mmds" else ():
            if name not in _FIELDS[path]:
                expected = ", ".join(f"`{known}`" for known in _FIELDS[path])
                column = data.index(name.encode()) + len(name) + 1
                raise Refusal(
                    "An error occurred when deserializing the json body of a request: unknown field "
                    f"`{name}`, expected one of {expected} at line 1 column {column}."
                )
        return route(body)

    def _reply(self, status: int, said: object) -> None:
        data = b"" if said is None else json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Connection", "keep-alive")
        if data:
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


def main(version: str, arguments: list[str]) -> int:
    if "--version" in arguments:
        print(f"Firecracker v{version}\n")
        _leave(0)
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    unknown = set(given) - {"--id", "--api-sock", "--level", "--metrics-path", *_OF_THE_JAILER}
    if unknown:
        bare = unknown.pop().lstrip("-")
        print(f'Error: ParseArguments(UnexpectedArgument("{bare}"))', file=sys.stderr)
        return 153
    path = given["--api-sock"]
    running = RunningVm(given["--id"], version)
    running.metrics = given.get("--metrics-path", running.metrics)
    Handler.routes = _routes(running)
    try:
        server = Server(path, Handler)
    except OSError:
        print(f"Failed to open the API socket at: {path}. Check that it is not already used.")
        print(f'Error: RunWithApi(FailedToBindSocket("{path}"))', file=sys.stderr)
        return 1
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
