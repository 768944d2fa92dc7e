"""`python -m pytest_fcvm.cli`."""

import sys

from pytest_fcvm.cli import main

sys.exit(main())
