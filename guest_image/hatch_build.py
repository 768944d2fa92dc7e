"""The wheel's build hook: compile the guest agents into the package; an editable install gets the host's alone."""

from __future__ import annotations

import importlib.util
import platform
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_MACHINES = ("x86_64", "aarch64")


class AgentHook(BuildHookInterface[Any]):
    """Run guest_image/build before the files of a wheel are collected."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the agents. Elsewhere than on Linux the wheel has none, and says so when a machine is asked for."""
        if self.target_name != "wheel" or sys.platform != "linux":
            return
        vms = [platform.machine()] if version == "editable" else list(_MACHINES)
        dest = Path(self.root) / "pytest_fcvm" / "agents"
        _load_builder(Path(self.root) / "guest_image" / "build").build_agents(vms, dest)
        build_data["artifacts"] += [f"pytest_fcvm/agents/agent-{running}" for running in vms]


def _load_builder(path: Path) -> Any:
    loader = SourceFileLoader("fcvm_agent_build", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module
    loader.exec_module(module)
    return module
