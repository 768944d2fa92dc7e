"""The wheel's build hook: compile the guest agents into the package. An editable install gets only the host's agent."""

from __future__ import annotations

import importlib.util
import platform
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_ARCHITECTURES = ("x86_64", "aarch64")


class AgentHook(BuildHookInterface[Any]):
    """Run guest_image/build before hatchling collects the files of a wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the agents. On other systems than Linux the wheel has none, and starting a clone reports that."""
        if self.target_name != "wheel" or sys.platform != "linux":
            return
        architectures = [platform.machine()] if version == "editable" else list(_ARCHITECTURES)
        dest = Path(self.root) / "pytest_fcvm" / "agents"
        _load_builder(Path(self.root) / "guest_image" / "build").build_agents(architectures, dest)
        build_data["artifacts"] += [f"pytest_fcvm/agents/agent-{architecture}" for architecture in architectures]


def _load_builder(path: Path) -> Any:
    loader = SourceFileLoader("fcvm_agent_build", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module
    loader.exec_module(module)
    return module
