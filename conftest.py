"""Settings of this project's own tests. The plugin itself comes by its entry point and must not be listed here."""

import os

pytest_plugins = ["pytester"]

# pytest prints more in CI, and our tests look at what it prints: it must be the same everywhere.
for _name in ("CI", "BUILD_NUMBER"):
    os.environ.pop(_name, None)
