"""The kernel's figures, from trees of files as the kernel writes them, and from this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_fcvm.host.admission.memory import HostMemory

MIB = 1 << 20


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:        8388608 kB\nMemFree:  1 kB\nMemAvailable:    4194304 kB\n"}
V2 = {
    "proc/self/cgroup": "0::/user.slice/job\n",
    "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n",
    "sys/fs/cgroup/cgroup.procs": "",
    "sys/fs/cgroup/user.slice/memory.max": "max\n",
    "sys/fs/cgroup/user.slice/memory.high": "max\n",
    "sys/fs/cgroup/user.slice/memory.current": "1\n",
    "sys/fs/cgroup/user.slice/job/memory.max": "max\n",
    "sys/fs/cgroup/user.slice/job/memory.high": "max\n",
    "sys/fs/cgroup/user.slice/job/memory.current": f"{600 * MIB}\n",
    "sys/fs/cgroup/user.slice/job/memory.stat": f"anon 1\ninactive_file {100 * MIB}\nactive_file 5\n",
}


def test_this_host_has_memory_and_no_more_available_than_in_total() -> None:
    memory = HostMemory()
    assert 0 < memory.available_mib() <= memory.total_mib()


def test_without_a_limit_the_total_is_that_of_the_host(tmp_path: Path) -> None:
    memory = HostMemory(write(tmp_path, MEMINFO | V2))
    assert (memory.available_mib(), memory.total_mib()) == (4096, 8192)


@pytest.mark.parametrize("limit", ["memory.max", "memory.high"])
def test_our_groups_limit_counts_less_its_usage_without_page_cache(tmp_path: Path, limit: str) -> None:
    files = MEMINFO | V2 | {f"sys/fs/cgroup/user.slice/job/{limit}": f"{2048 * MIB}\n"}
    memory = HostMemory(write(tmp_path, files))
    assert (memory.available_mib(), memory.total_mib()) == (2048 - 600 + 100, 2048)


def test_the_limit_of_a_group_above_ours_counts_too(tmp_path: Path) -> None:
    files = (
        MEMINFO
        | V2
        | {
            "sys/fs/cgroup/user.slice/memory.max": f"{1024 * MIB}\n",
            "sys/fs/cgroup/user.slice/memory.current": f"{1000 * MIB}\n",
            "sys/fs/cgroup/user.slice/job/memory.max": f"{2048 * MIB}\n",
        }
    )
    memory = HostMemory(write(tmp_path, files))
    assert (memory.available_mib(), memory.total_mib()) == (24, 1024)


def test_a_group_above_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = MEMINFO | V2 | {"sys/fs/cgroup/user.slice/job/memory.high": f"{100 * MIB}\n"}
    assert HostMemory(write(tmp_path, files)).available_mib() == 0


def test_control_groups_of_version_1_count(tmp_path: Path) -> None:
    files = MEMINFO | {
        "proc/self/cgroup": "4:memory:/docker/abc\n1:cpu:/\n0::/\n",
        # A container sees its own group as the top of the mount.
        "proc/self/mountinfo": "40 23 0:30 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{512 * MIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{300 * MIB}\n",
        "sys/fs/cgroup/memory/memory.stat": f"inactive_file 5\ntotal_inactive_file {50 * MIB}\n",
    }
    memory = HostMemory(write(tmp_path, files))
    assert (memory.available_mib(), memory.total_mib()) == (512 - 300 + 50, 512)


def test_version_1s_number_for_no_limit_is_no_limit(tmp_path: Path) -> None:
    files = MEMINFO | {
        "proc/self/cgroup": "4:memory:/\n",
        "proc/self/mountinfo": "40 23 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{300 * MIB}\n",
    }
    assert HostMemory(write(tmp_path, files)).available_mib() == 4096


def test_without_control_groups_the_hosts_memory_counts(tmp_path: Path) -> None:
    assert HostMemory(write(tmp_path, MEMINFO)).available_mib() == 4096
