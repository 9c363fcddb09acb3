"""Normal draws that every backend makes alike, and the sums of their moments in plain PyTorch.

The draws are a function of (seed, position, branch) alone: Philox4x32-10 counters and Box-Muller (docs/architecture.md,
section 8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..activations import ActivationMap

#: Draws that a backend adds up by itself.
CHUNK = 4096
_MASK = 0xFFFFFFFF


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
    if torch.device(device).type == "cpu" and native.load():
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


def reference_moments(
    sigmas: Tensor, params: Tensor, start: int, samples: int, seed: int, map: ActivationMap
) -> Tensor:
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
