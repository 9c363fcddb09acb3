"""What the executor is worth: every barrier, wait and fence of a kernel is taken out in turn, and has to be missed.

A missing wgmma.fence of left factors alone is told, though no fault (`engine.HARMLESS`).

Which are not missed, and why: Triton's passes put a barrier wherever memory of one buffer may be used again, each pass
by itself, and waits for all stores to tensor memory at each of them. Where two stand for one hazard, either may go. So
a removal that goes unnoticed must be just that: still no fault and the same bits in every order of the warps.
"""

import pytest
import torch
from fused_inr.bench import ptx
from fused_inr.bench.cases import Case, Workload
from fused_inr.bench.ptx import ExecutionOptions, engine

pytestmark = pytest.mark.slow

ORDERS = ("bar.", "barrier", "cp.async.wait", "fence.proxy", "wgmma.wait", "wgmma.fence", "tcgen05.wait")
#: capability, step, way, width, kernel, and the share that must be noticed
KERNELS = [
    (80, "inference", "default", 64, "forward_kernel", 0.85),
    (80, "training", "one-pass", 64, "train_kernel", 0.85),
    (80, "training", "one-pass", 32, "one_pass_kernel", 0.85),
    (80, "training", "default", 128, "train_kernel", 0.85),
    (90, "inference", "default", 64, "forward_kernel", 0.85),
    (90, "training", "one-pass", 64, "train_kernel", 0.85),
    (90, "training", "default", 128, "train_kernel", 0.85),
    # each store to tensor memory brings a wait and a barrier, and products follow each other anyway
    (100, "training", "one-pass", 64, "train_kernel", 0.75),
]


class Planted:
    """A network's step on a device of its own, with an instruction of one kernel taken out."""

    def __init__(self, capability: int, step: str, way: str, width: int, kernel: str):
        self.capability, self.kernel = capability, kernel
        self.work = Workload(Case("network", step, "sine", width, rows=420, precision="bf16", way=way))

    def run(self, *without: int, order: str = "ascending"):
        """The results, and the kernel's launch."""

        def mutate(program):
            return program.without(*without) if program.name == self.kernel and without else program

        with ptx.emulated(self.capability, ExecutionOptions(order=order)) as device, ptx.few_programs(1):
            device.mutate = mutate
            results = self.work.outcome("fused")
        (launch,) = (found for found in device.launches if found.name == self.kernel)
        return results, launch


def left_factors(launch) -> set[int]:
    """Products whose left factor is not ordered behind what writes it."""
    return {found.instruction for found in launch.harmless if found.kind == engine.KINDS[-1]}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("capability", "step", "way", "width", "kernel", "share"), KERNELS)
def test_what_orders_memory_is_missed(capability, step, way, width, kernel, share):
    planted = Planted(capability, step, way, width, kernel)
    expected, base = planted.run()
    assert not base.faults
    names = base.program.mnemonics
    candidates = [i for i, name in enumerate(names) if name.startswith(ORDERS) and base.counts[i]]
    assert len(candidates) >= 10
    launches = {i: planted.run(i)[1] for i in candidates}
    silent = [i for i, launch in launches.items() if not launch.faults]
    for i in silent:
        # in another order a read that races without effect comes before the write
        harmless = {(found.other, found.instruction) for found in launches[i].harmless}
        for order in ("descending", "shuffled"):
            results, launch = planted.run(i, order=order)
            faults = [fault for fault in launch.faults if (fault.instruction, fault.other) not in harmless]
            assert not faults and equal(results, expected), (base.program.text[i], order, faults[:1])
    unseen = [i for i in silent if not left_factors(launches[i]) - left_factors(base)]
    noticed = 1 - len(unseen) / len(candidates)
    assert noticed >= share, [f"{base.program.text[i]} [{base.program.locations[i]}]" for i in unseen]


@pytest.mark.parametrize("name", ["wgmma.wait", "fence.proxy", "bar.sync", "wgmma.fence"])
def test_without_any_of_a_kind(name):
    """Redundant or not: without all of them a kernel of sm_90 is wrong."""
    planted = Planted(90, "training", "one-pass", 64, "train_kernel")
    _, base = planted.run()
    every = [i for i, mnemonic in enumerate(base.program.mnemonics) if mnemonic.startswith(name)]
    assert every and planted.run(*every)[1].faults
