"""The wheel's build hook: name the platforms that the built program runs on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_PACKAGE = "pytest_fcvm_qemu_x86_64"


class PlatformHook(BuildHookInterface[Any]):
    """Give the wheel the tags of every x86_64 Linux if the program is static, else of this one alone."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002  the hook's signature
        """Set the tag. Raise FileNotFoundError where `build` has not built the program."""
        facts = json.loads((Path(self.root) / _PACKAGE / "source.json").read_text())
        everywhere = "manylinux_2_17_x86_64.musllinux_1_1_x86_64"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{everywhere if facts['static'] else 'linux_x86_64'}"
