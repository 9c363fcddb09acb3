"""`fused_inr.backends` is `fused_inr.ops.backends`: one module, so one table and one choice, under two names."""

import sys

from .ops import backends

sys.modules[__name__] = backends
