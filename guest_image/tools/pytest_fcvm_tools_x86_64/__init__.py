"""The tools of pytest-fcvm for x86_64: static programs, their licences and the versions of their sources.

pytest-fcvm does not import this package: it finds the package's directory and runs the programs there.
"""
