"""Run a helper program of this directory in a Python without `site`: `program.py MODULE ARGUMENT…`, by path.

The program is imported as a module, so that Python caches its bytecode.
"""

from __future__ import annotations

import sys
from importlib import import_module

if __name__ == "__main__":
    sys.path.append(__file__.rsplit("/", 3)[0])
    import_module(f"pytest_fcvm.network.{sys.argv[1]}").main(*sys.argv[2:])
