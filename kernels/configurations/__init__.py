"""Configurations of the Triton kernels: what a launch's tiles, warps and stages are, as data.

| file | holds |
| --- | --- |
| `linear_act.py` | layers: the general table, the predicate of what a device can hold, the look-up; architectures |
| `linear_act_table.py` | layers: where an architecture differs from the general table, and why |
| `mlp.py` | whole networks: predicate and look-up |
| `mlp_table.py` | whole networks: the table, and why |

`fused-inr bench tune` writes both tables (docs/kernels.md).
"""
