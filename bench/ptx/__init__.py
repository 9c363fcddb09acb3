"""Compiled kernels without a GPU: the PTX that Triton (or nvcc) makes, executed on the CPU.

A kernel goes Triton's own way: binder, specialisation, compiler, launch arguments. Then, in place of the driver, an
executor runs its PTX, one warp instruction at a time, and reports what a device would do wrong without a word: accesses
out of bounds or misaligned, races between warps and blocks, missing waits and fences, shared memory read before it was
written.

```python
from fused_inr.bench import ptx

with ptx.emulated(80) as device:   # compute capability; 90: wgmma
    y = net(x)                     # CPU tensors: backend "triton" serves them meanwhile
device.check()                     # raises ptx.Fault with all that was found
for launch in device.launches:     # what ran: name, grid, faults, counts of each instruction
    print(launch)

with ptx.triton_driver(80) as device:  # only Triton's driver: any kernel, no fused_inr
    kernel[grid](tensor, ...)
```

Needs x86-64 with AVX2 and a C++ compiler (the executor is compiled when it is first used), and Triton, not
interpreting. Not in a process that uses Triton's real driver. What is modelled and what not: docs/kernels.md.
"""

from .device import EmulatedDevice, Fault, triton_driver, unavailable
from .engine import ExecutionOptions, Launch
from .serving import emulated, few_programs

__all__ = [
    "EmulatedDevice",
    "ExecutionOptions",
    "Fault",
    "Launch",
    "emulated",
    "few_programs",
    "triton_driver",
    "unavailable",
]
