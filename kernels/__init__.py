"""Triton kernels, one file per operation.

| file | what |
| --- | --- |
| `linear_act.py` | `linear_act`, `linear_act_backward`: the raw operations on plain tensors |
| `act_map.py` | `act_map`: a generated map of any level, elementwise |
| `mlp.py` | `mlp`, `mlp_backward`, `mlp_loss`: whole networks, forward and training pass |
| `primitives.py`, `maps.py`, `generated/` | the functions that the kernels take as a constexpr argument |
| `moments.py` | sums of a map's value and derivatives over normal draws |
| `tune.py`, `mlp_tune.py` | block sizes: predicates of validity and look-ups |
| `tuned.py`, `mlp_tuned.py` | their tables, rewritten by `fused-inr bench tune` |
| `aot.py` | compiles all of it without a GPU |

Importing this package needs no Triton; its modules do.
"""
