"""Runs the command line: `python -m fused_inr.cli`."""

import sys

from .main import main

sys.exit(main())
