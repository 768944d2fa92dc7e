"""The QEMU of pytest-fcvm for x86_64: the program, its firmware, licences and sources.

pytest-fcvm does not import this package: it finds the package's directory and runs `qemu-system-x86_64` there.
"""
