"""Settings of this project's own tests. The plugin itself comes by its entry point and must not be listed here."""

pytest_plugins = ["pytester"]
