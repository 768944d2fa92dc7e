#!/usr/bin/env python3
"""What a user installs: sdist, a wheel made from it, a clean environment without a compiler, one clone from there."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_SUITE = """
import urllib.request

def test_home(fcvm_clone):
    assert urllib.request.urlopen(fcvm_clone.url(80), timeout=60).status == 200
"""


def main() -> int:
    """Build, install, run; print a closing line that counts."""
    with tempfile.TemporaryDirectory(prefix="fcvm-packaging-") as scratch:
        directory = Path(scratch)
        wheel = _build(directory)
        _check_contents(wheel)
        python = _install(wheel, directory / "clean")
        image = _run([sys.executable, str(_ROOT / "examples/images/build.py"), "nginx", str(_ROOT / ".demo")]).strip()
        (directory / "test_wheel.py").write_text(_SUITE)
        # Isolated, and far from the checkout: it must not shadow the installed wheel.
        output = _run(
            [
                python,
                "-Im",
                "pytest",
                "--import-mode=importlib",
                "-p",
                "no:cacheprovider",
                "test_wheel.py",
                f"--fcvm-image=oci:{image}:latest",
            ],
            cwd=directory,
            env={"PATH": _path_without_compilers(directory), "HOME": os.environ.get("HOME", "/root")},
        )
    print(output)
    if "1 passed" not in output:
        print("packaging: 0 passed, 1 failed")
        return 1
    print("packaging: 1 passed, 0 failed")
    return 0


def _build(directory: Path) -> Path:
    _run([sys.executable, "-m", "build", "--sdist", "--outdir", str(directory), str(_ROOT)])
    (sdist,) = directory.glob("*.tar.gz")
    _run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(directory), str(sdist)])
    (wheel,) = directory.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl"), wheel.name
    return wheel


def _check_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in ("pytest_fcvm/agents/agent-x86_64", "pytest_fcvm/agents/agent-aarch64", "pytest_fcvm/py.typed"):
        assert wanted in names, f"{wanted} is not in {wheel.name}"


def _install(wheel: Path, directory: Path) -> str:
    venv.create(directory, with_pip=True)
    python = str(directory / "bin/python")
    _run([python, "-m", "pip", "install", "--quiet", str(wheel)])
    return python


def _path_without_compilers(directory: Path) -> str:
    """Return a PATH with the tools that VMs need, and no compiler."""
    tools = directory / "tools"
    tools.mkdir()
    for name in (
        "qemu-system-x86_64",
        "skopeo",
        "mksquashfs",
        "zstd",
        "lz4",
        "apt-get",
        "apt-cache",
        "dpkg-deb",
        "tar",
        "setpriv",
        "sh",
    ):
        for place in ("/usr/bin", "/usr/sbin", "/bin", "/usr/local/bin"):
            if (Path(place) / name).exists() and not (tools / name).exists():
                (tools / name).symlink_to(Path(place) / name)
    return str(tools)


def _run(command: list[str], *, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    print("+", " ".join(command[:6]), "…" if len(command) > 6 else "", flush=True)
    done = subprocess.run(
        command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode:
        print(done.stdout)
        print("packaging: 0 passed, 1 failed")
        sys.exit(1)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
