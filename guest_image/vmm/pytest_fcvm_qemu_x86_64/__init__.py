"""The QEMU of pytest-fcvm for x86_64: the program, its firmware and its sources' description.

pytest-fcvm does not import this package: it finds the package's directory and starts `qemu-system-x86_64` there.
"""
