"""How long tests wait for what must come: FCVM_TEST_PATIENCE times as long where the machine itself is emulated."""

from __future__ import annotations

import os

PATIENCE = float(os.environ.get("FCVM_TEST_PATIENCE", "1"))
