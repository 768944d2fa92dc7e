"""The guest kernel of pytest-fcvm for x86_64: bzImage, its configuration and its sources.

pytest-fcvm does not import this package: it finds the package's directory and reads `bzImage` there.
"""
