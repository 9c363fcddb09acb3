"""`fused-inr bench gpu`: what a CUDA machine has to tell, in one command, the most important first.

| file | what |
| --- | --- |
| `driver.py` | the command: parts and cells in order within a budget, compiling ahead, results after each cell |
| `cells.py` | the list of cells: what is measured, in which order |
| `measure.py` | what a worker does for a cell: ceilings, times of all variants of a case, moments |
| `checks.py` | accuracy gates, the GPU tests, compute-sanitizer, every float32 sine, profiles by ncu |
| `workers.py` | the processes that measure and compile, and what they say |
| `summary.py` | tables and the figure |
"""

from .driver import main as main
