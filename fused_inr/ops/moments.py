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

import torch
from torch import Tensor

from ..activations import ActivationMap
from . import backends

#: Draws that a backend adds up by itself.
CHUNK = 4096
#: Bytes of sums per chunk that are held at a time.
_WINDOW_BYTES = 32 << 20
_MASK = 0xFFFFFFFF


# -- the reference


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of four counter words (int64 tensors that hold uint32) and two key words: four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # 64-bit integers wrap: the product's bits are those of an unsigned one
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def random_bits(start: int, count: int, branch: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Words `start` to `start + count` of a branch's stream, int64 in [0, 2^32), [count]; both multiples of 4."""
    q = torch.arange(start // 4, (start + count) // 4, device=device)
    counter = (q & _MASK, (q >> 32) & _MASK, torch.full_like(q, branch), torch.zeros_like(q))
    return torch.stack(philox(counter, (seed & _MASK, (seed >> 32) & _MASK)), -1).flatten()


def normals(start: int, count: int, branch: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Draws `start` to `start + count` of a branch, float32 [count]; `start` a multiple of 4."""
    words = -(-count // 4) * 4
    if torch.device(device).type == "cpu" and backends.TABLE["cpu"].available()[0]:
        bits = torch.ops.fused_inr_native.random_bits(start, words, branch, seed).view(-1, 2)
    else:
        bits = random_bits(start, words, branch, seed, device).view(-1, 2)
    u = bits[:, 0].float() * 2.0**-32 + 2.0**-33  # in (0, 1]
    turn = (bits[:, 1] - ((bits[:, 1] >> 31) << 32)).float() * (torch.pi * 2.0**-31)
    radius = (-2 * u.log()).clamp_min(0).sqrt()
    return torch.stack((radius * turn.cos(), radius * turn.sin()), -1).flatten()[:count]


def powers(values: Tensor) -> Tensor:
    """[.., n] -> [.., 3] float64: sums of v, v^2, v^4 over the last dimension of at most a chunk.

    In one order, whatever the other dimensions and the threads: PyTorch splits no sum of 64 numbers among many.
    """
    v = torch.nn.functional.pad(values.double(), (0, CHUNK - values.shape[-1])).unflatten(-1, (64, 64))
    square = v * v
    return torch.stack([x.sum(-1).sum(-1) for x in (v, square, square * square)], -1)


def chunk_powers(values: Tensor) -> Tensor:
    """[n] -> [chunks, 3]: `powers` of each chunk; the last one may be shorter."""
    values = torch.nn.functional.pad(values, (0, -len(values) % CHUNK))  # zeros add nothing
    return powers(values.view(-1, CHUNK))


def reference(sigmas: Tensor, params: Tensor, start: int, samples: int, seed: int, map: ActivationMap) -> Tensor:
    """`Backend.moments` in plain PyTorch."""
    branches = map.branches
    values = map.outputs * (1 + branches)
    chunks = -(-samples // CHUNK)
    sums = torch.empty(chunks, len(sigmas), values, 3, dtype=torch.float64, device=sigmas.device)
    jet = map.torch_jet()
    own = params.float().unsqueeze(-1).unbind(1)
    # fewer numbers than PyTorch divides among threads: where a part ends, elementary functions round differently
    at_a_time = ((1 << 15) - 1) // CHUNK
    for chunk in range(chunks):
        n = min(CHUNK, samples - chunk * CHUNK)
        # always a whole chunk, so that no draw's place among those that are evaluated depends on how many are asked for
        draws = [normals(start + chunk * CHUNK, CHUNK, b, seed, sigmas.device) for b in range(branches)]
        for at in range(0, len(sigmas), at_a_time):
            some = slice(at, at + at_a_time)
            z = [sigmas[some, b, None].float() * draws[b] for b in range(branches)]
            out = jet(*z, *(p[some] for p in own))
            for k, value in enumerate(out):
                sums[chunk, some, k] = powers(torch.as_tensor(value).expand_as(z[0])[:, :n])
    return sums


# -- any backend


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
