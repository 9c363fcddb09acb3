"""Which code runs an operation: one table of backends, each with a reason where it cannot serve.

```python
fused_inr.backends.available()            # {'triton': (False, 'no CUDA device ...'), 'cpu': (True, ''), ...}
with fused_inr.backends.use("reference"):  # this or an error
    net(x)
print(fused_inr.backends.explain(net, x))  # what would run where, and why
with fused_inr.backends.float32_products("bf16x3"):  # of float32 on a GPU, whatever PyTorch's settings say
    net(x)
```

Without `use`, the first backend of the table that serves is taken; when that is the reference although a faster one
is meant for the device, a warning says so once, with the reason.

| file | holds |
| --- | --- |
| `base.py` | what a backend is, and what several share |
| `reference.py`, `draws.py` | plain PyTorch |
| `native.py` | `cpu`, and what it shares with `cuda` |
| `triton.py`, `cuda.py` | the GPU's |
| `precision.py` | products of float32 numbers |
| `choice.py` | the table, and who is chosen |
| `explanation.py` | why: `explain` |
| `settings.py` | values that hold for a block of one thread |
"""

from .base import Backend, refuse_freed
from .choice import (
    TABLE,
    available,
    choose,
    choose_moments,
    demanded,
    implementation,
    precision_of,
    record_network,
    record_plain,
    record_plain_network,
    refusal,
    state,
    use,
    why_plain,
)
from .cuda import Cuda
from .explanation import Choice, explain, record_layers
from .native import Cpu, empty_cache, set_cache_limit
from .precision import PRODUCTS, float32_products, products_of, set_float32_products
from .reference import Reference, reference_map
from .triton import Triton

__all__ = [
    "PRODUCTS",
    "TABLE",
    "Backend",
    "Choice",
    "Cpu",
    "Cuda",
    "Reference",
    "Triton",
    "available",
    "choose",
    "choose_moments",
    "demanded",
    "empty_cache",
    "explain",
    "float32_products",
    "implementation",
    "precision_of",
    "products_of",
    "record_layers",
    "record_network",
    "record_plain",
    "record_plain_network",
    "reference_map",
    "refusal",
    "refuse_freed",
    "set_cache_limit",
    "set_float32_products",
    "state",
    "use",
    "why_plain",
]
