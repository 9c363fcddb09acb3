"""Tests of `tests/suite/gpu.py` on an emulated device: layouts, batches, learnable parameters, autocast, vmap, values
that are not finite, random numbers, moments. `device` is the emulated one's here; conftest.py says which are slow.

What makes no sense emulated stays with a GPU: streams, captured graphs, growing memory, 2^31 elements, speed.
"""

# ruff: noqa: F401
from suite.gpu import (
    test_a_batch_of_weights_is_as_many_layers,
    test_autocast,
    test_float32_sine_at_every_exponent,
    test_layouts,
    test_learnable_parameters,
    test_moments_agree_with_the_cpus_and_are_the_same_bits,
    test_narrow_layers,
    test_no_rows,
    test_the_stream_of_random_numbers_is_the_cpus,
    test_the_triton_backend_serves_cuda_tensors,
    test_third_order,
    test_values_that_are_not_finite_stay_in_their_rows,
    test_vmap_over_weights_and_rows,
)
