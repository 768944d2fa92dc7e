"""A program that does what Firecracker's jailer 1.16.1 does, except two steps after which no Python could run.

    jailer.py VERSION [the jailer's own arguments]

It changes neither the root directory nor the user. It starts its program in the directory that would be the root.
tests/firecracker compares the fake with the real jailer.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import stat
import sys
from pathlib import Path


def main() -> None:
    version = sys.argv[1]
    if sys.argv[2:] == ["--version"]:
        print(f"Jailer v{version}\n")
        return
    os.closerange(3, 1 << 16)
    parser = argparse.ArgumentParser()
    for name in ("id", "exec-file", "chroot-base-dir", "cgroup-version"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("uid", "gid"):
        parser.add_argument(f"--{name}", required=True, type=int)
    given = parser.parse_args(sys.argv[2 : sys.argv.index("--")])
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", given.id):
        sys.exit(f"Invalid instance ID: Invalid char in instance ID: {given.id}")
    program = Path(given.exec_file).resolve(strict=True)
    if "firecracker" not in program.name:
        sys.exit(f"Invalid filename. The filename of `--exec-file` option must contain firecracker: {program.name}")
    root = Path(given.chroot_base_dir).resolve(strict=True) / program.name / given.id / "root"
    root.mkdir(parents=True, exist_ok=True)
    copy = root / program.name
    shutil.copyfile(program, copy)
    copy.chmod(program.stat().st_mode)
    os.chown(copy, given.uid, given.gid)
    for directory in ("", "dev", "dev/net", "run"):
        (root / directory).mkdir(exist_ok=True)
        (root / directory).chmod(0o700)
        os.chown(root / directory, given.uid, given.gid)
    devices = {"dev/net/tun": (10, 200), "dev/kvm": (10, 232), "dev/urandom": (1, 9)}
    if (faults := Path("/dev/userfaultfd")).exists():
        devices["dev/userfaultfd"] = (10, os.minor(faults.stat().st_rdev))
    for name, numbers in devices.items():
        os.mknod(root / name, stat.S_IFCHR | 0o600, os.makedev(*numbers))
        os.chown(root / name, given.uid, given.gid)
    (root / f"{program.name}.pid").write_text(str(os.getpid()))
    os.chdir(root)
    clock = ["--start-time-us", "1", "--start-time-cpu-us", "1", "--parent-cpu-time-us", "1"]
    arguments = [f"/{program.name}", "--id", given.id, *clock, *sys.argv[sys.argv.index("--") + 1 :]]
    os.execve(copy, arguments, {})


main()
