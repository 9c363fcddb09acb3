"""Moments of an activation under normal pre-activations, for a grid of standard deviations and parameters at once.

    z_b = sigma_b n_b,  n_b ~ N(0, 1) independent:    sums over draws of v, v^2, v^4 for v = f_c(z) and df_c/dz_b

The draws are a function of (seed, position, branch) alone: Philox4x32-10 counters and Box-Muller (docs/architecture.md,
section 8). All settings of a grid share them, so that moments are smooth functions of sigma. Every chunk of 4,096 draws
is summed by a backend in one fixed order, and chunks are added here in a binary tree: the same bits for any number of
threads, programs, settings a call, or calls that the draws are divided into.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .. import backends
from ..activations import ActivationMap
from ..backends.draws import CHUNK, chunk_powers, normals, philox, powers, random_bits
from ..backends.draws import reference_moments as reference

__all__ = [
    "CHUNK",
    "Sums",
    "accumulate",
    "chunk_powers",
    "normals",
    "philox",
    "powers",
    "random_bits",
    "reference",
    "sums",
]

#: Bytes of sums per chunk that are held at a time.
_WINDOW_BYTES = 32 << 20


@dataclass(frozen=True)
class Sums:
    """Over all draws: `powers` [G, V, 3] of v, v^2, v^4; `squares` [G, V, V]: over whole chunks, of the products of two
    values' chunk sums of v^2 (their spread over `chunks` chunks is the covariance of second moments)."""

    powers: Tensor
    squares: Tensor
    chunks: int


def sums(sigmas: Tensor, params: Tensor, samples: int, seed: int, map: ActivationMap, start: int = 0) -> Sums:
    """Sums over draws `start` to `start + samples` for G settings: sigmas [G, B], params [G, P], float32.

    Values are those of the map's jet: y[C], then for each output its derivatives with respect to z[B].
    """
    name = backends.choose_moments(map, sigmas.device)
    backend = backends.implementation(name)

    def part(at: int, n: int) -> Tensor:
        return backend.moments(sigmas, params, at, n, seed, map)

    return accumulate(part, len(sigmas), map.outputs * (1 + map.branches), samples, start)


def accumulate(part: Callable[[int, int], Tensor], settings: int, values: int, samples: int, start: int = 0) -> Sums:
    """`Sums` from `part(start, n)`, which returns those of each chunk, [chunks, settings, values, 3]."""
    # a power of two of chunks: such windows are the tree's own nodes
    window = 1
    while 2 * window * settings * values * 3 * 8 <= _WINDOW_BYTES and window * CHUNK < samples:
        window *= 2
    tree = _Tree()
    for at in range(0, samples, window * CHUNK):
        n = min(window * CHUNK, samples - at)
        sums = part(start + at, n)
        whole = sums[: n // CHUNK, :, :, 1]
        # sums and products of sums side by side, with zeros for chunks that are missing at the end
        rows = sums.new_zeros(1 << (len(sums) - 1).bit_length(), settings, values * (3 + values))
        rows[: len(sums), :, : 3 * values] = sums.flatten(2)
        rows[: len(whole), :, 3 * values :] = (whole.unsqueeze(-1) * whole.unsqueeze(-2)).flatten(2)
        tree.add(rows, window)
    total = tree.total()
    powers, squares = total[:, : 3 * values], total[:, 3 * values :]
    return Sums(powers.unflatten(1, (values, 3)), squares.unflatten(1, (values, values)), samples // CHUNK)


class _Tree:
    """Sum over chunks as a binary tree over their numbers, with zeros where chunks are missing at the end."""

    def __init__(self) -> None:
        self.nodes: list[tuple[int, Tensor]] = []  # (chunks below it, sum), sizes falling

    def add(self, chunks: Tensor, size: int) -> None:
        while len(chunks) > 1:  # a power of two
            chunks = chunks[0::2] + chunks[1::2]
        self.nodes.append((size, chunks[0]))
        while len(self.nodes) > 1 and self.nodes[-1][0] == self.nodes[-2][0]:
            (size, right), (_, left) = self.nodes.pop(), self.nodes.pop()
            self.nodes.append((2 * size, left + right))

    def total(self) -> Tensor:
        _, total = self.nodes[-1]
        for _, node in reversed(self.nodes[:-1]):
            total = node + total
        return total
