"""Triton kernels, one file per operation.

| file | what |
| --- | --- |
| `linear_act.py` | `linear_act`, `linear_act_backward`: the raw operations on plain tensors |
| `act_map.py` | `act_map`: a generated map of any level, elementwise |
| `mlp/` | `mlp`, `mlp_backward`, `mlp_loss`: whole networks, forward and training pass |
| `moments.py` | sums of a map's value and derivatives over normal draws |
| `sums.py` | sums over programs in a fixed order |
| `primitives.py`, `maps.py`, `generated/` | the functions that the kernels take as a constexpr argument |
| `configurations/` | tiles, warps and stages: predicates of validity, tables, look-ups |
| `launch.py`, `assembler.py` | launches without Triton's binder; a sound assembler for Hopper |

Importing this package needs no Triton; its modules do.
"""
