"""The guest kernel of pytest-fcvm for x86_64: bzImage, its configuration, and what it was built from.

Nothing is imported from here: pytest-fcvm looks for this package's folder and takes `bzImage` out of it.
"""
