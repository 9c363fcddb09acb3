"""Networks as public codebases write them, for `fuse`: in our own words, with the structure that a replacement meets.

What a codebase stands for is how its layers are spelled (in-place functions, shared activation modules, permuted
weights, scalars computed at each call, weights that are computed), how its users train it, and which methods they call.
Nothing of their code is here. `codebases()` has them all; tests hold `fuse` to each, and `fused-inr bench codebases`
times them.
"""

from __future__ import annotations

from ._registry import Codebase, codebases

__all__ = ["Codebase", "codebases"]
