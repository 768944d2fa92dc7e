"""Where the tests of this run have their cache."""

from __future__ import annotations

import os
from pathlib import Path

from pytest_fcvm.host.paths import cache_root

__all__ = ["cache_of_this_run"]


def cache_of_this_run() -> Path:
    """Return the cache's directory, also where the environment names another one."""
    named = os.environ.get("FCVM_CACHE_DIR")
    return cache_root(Path(named) if named else None)
