"""Benches: `fused-inr bench table | static | gpu` and, in a checkout, `pytest bench`.

`cases.py` holds what is measured (networks, layers, steps, their eager twins, the check that comes before the clock),
`bounds.py` what counts as correct, `timing.py` how it is measured, `report.py` how it is written down; `table.py` (with
`worker.py`, its processes) and `gpu.py` are the commands, `test_layer.py` and `test_network.py` the pytest-benchmark
suites. `ptx` executes compiled kernels without a GPU.
"""
