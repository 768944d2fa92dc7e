"""The wheel's build hook: name the platforms that the built programs run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_PACKAGE = "pytest_fcvm_tools_x86_64"


class PlatformHook(BuildHookInterface[Any]):
    """Give the wheel the tags of every x86_64 Linux: its programs are static."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002  the hook's signature
        """Set the tag. Raise FileNotFoundError where `build` has not built the programs."""
        (Path(self.root) / _PACKAGE / "source.json").stat()
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-manylinux_2_17_x86_64.musllinux_1_1_x86_64"
