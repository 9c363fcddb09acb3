"""Moments of a map over normal draws: sums of v, v^2, v^4 of its value and derivatives, for a grid of spreads at once.

Counter-based random numbers (Philox4x32-10) with explicit counters: draw s is the same wherever and whenever it is
made. A program takes a chunk of 4096 draws, keeps their normals in registers, and goes through the settings that are
its share: z_b = sigma[g, b] n_b, the map's jet, sums in float64. Every chunk is summed in one order, so neither the
number of settings a program takes nor the number of chunks of a call changes a bit; there are no atomics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import cdiv, mode, on_device
from .maps import INTERPRETED
from .primitives import fi_log, fi_sqrt, sincos_bounded

#: Draws of a chunk, whose sums are one entry of the result.
CHUNK = 4096

#: Programs that a call aims at, where it has as many: four for each multiprocessor of an H200.
TARGET_PROGRAMS = 528

#: Settings of a program at most: more spare nothing once the normals are a small share.
MAX_SETTINGS = 64


# ---------------------------------------------------------------- random numbers


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: four uint32 words of counters (uint32, of one shape) and a key. Salmon et al., "Parallel random
    numbers: as easy as 1, 2, 3", SC 2011."""
    for _ in tl.static_range(10):
        a0, a2 = c0, c2
        c0 = tl.umulhi(a2, 0xCD9E8D57) ^ c1 ^ k0
        c1 = a2 * 0xCD9E8D57
        c2 = tl.umulhi(a0, 0xD2511F53) ^ c3 ^ k1
        c3 = a0 * 0xD2511F53
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def words(q, branch, seed_low, seed_high):
    """The words of quads q (int64) of a branch: draws 4q .. 4q + 3."""
    low = (q & 0xFFFFFFFF).to(tl.uint32)
    high = (q >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    k0 = seed_low.to(tl.uint32, bitcast=True)
    k1 = seed_high.to(tl.uint32, bitcast=True)
    return philox4x32(low, high, zero + branch, zero, k0, k1)


@triton.jit
def quads(first_low, first_high, chunk, SLICES: tl.constexpr, s: tl.constexpr, QUADS: tl.constexpr):
    """The indices of the s-th slice of a chunk's quads, 64 bits: first + (chunk * SLICES + s) * QUADS .."""
    first = (first_high.to(tl.int64) << 32) | first_low.to(tl.uint32, bitcast=True).to(tl.int64)
    return first + (chunk.to(tl.int64) * SLICES + s) * QUADS + tl.arange(0, QUADS)


@triton.jit
def box_muller(a, b, MODE: tl.constexpr):
    """Two independent standard normals in float32 from two words."""
    u = a.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33: in (0, 1]
    t = b.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09  # pi 2^-31
    e = -2.0 * fi_log(u, MODE)
    r = fi_sqrt(tl.where(e > 0, e, 0.0), MODE)
    s, c = sincos_bounded(t, MODE)
    return r * c, r * s


@triton.jit(do_not_specialize=["count", "first_low", "first_high", "branch", "seed_low", "seed_high"])
def random_bits_kernel(
    out_ptr, count, first_low, first_high, branch, seed_low, seed_high, BLOCK_Q: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0)
    x0, x1, x2, x3 = words(quads(first_low, first_high, program, 1, 0, BLOCK_Q), branch, seed_low, seed_high)
    at = (program.to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)) * 4
    mask = at < count
    tl.store(out_ptr + at, x0.to(tl.int64), mask=mask)
    tl.store(out_ptr + at + 1, x1.to(tl.int64), mask=mask)
    tl.store(out_ptr + at + 2, x2.to(tl.int64), mask=mask)
    tl.store(out_ptr + at + 3, x3.to(tl.int64), mask=mask)


# ---------------------------------------------------------------- moments

_PLAIN = tl.constexpr(INTERPRETED)


@triton.jit
def pinned(x):
    """x, computed here. LLVM (Triton 3.7) sinks what only the last part's block uses into that block, past the branches
    for large arguments of the parts between: all parts' values are alive at once then, and spill."""
    if _PLAIN:
        return x
    else:
        return tl.inline_asm_elementwise("mov.b64 $0, $1;", "=d,d", [x], dtype=tl.float64, is_pure=False, pack=1)


@triton.jit(do_not_specialize=["G", "settings", "groups", "last", "first_low", "first_high", "seed_low", "seed_high"])
def moments_kernel(
    sigma_ptr, param_ptr, out_ptr, G, settings, groups, last, first_low, first_high, seed_low, seed_high,
    MAP: tl.constexpr, MODE: tl.constexpr, B: tl.constexpr, VALUES: tl.constexpr, P: tl.constexpr,
    SLICES: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """out[chunk, g, i] = sums of v_i, v_i^2, v_i^4 over BLOCK_M draws (the last chunk: over `last`), for `settings`
    settings g. A chunk is SLICES times 4 parts; part (s, i) holds draw 4q + i of the s-th slice's quads q."""
    QUADS: tl.constexpr = BLOCK_M // (4 * SLICES)
    chunk = tl.program_id(0) // groups
    group = (tl.program_id(0) % groups).to(tl.int64)
    normals = ()  # (slice, branch, i)
    for s in tl.static_range(SLICES):
        q = quads(first_low, first_high, chunk, SLICES, s, QUADS)
        for b in tl.static_range(B):
            x0, x1, x2, x3 = words(q, b, seed_low, seed_high)
            n0, n1 = box_muller(x0, x1, MODE)
            n2, n3 = box_muller(x2, x3, MODE)
            normals = normals + (n0, n1, n2, n3)
    chunks = tl.num_programs(0) // groups
    count = tl.where(chunk == chunks - 1, last, BLOCK_M)
    draw = tl.arange(0, QUADS) * 4
    first = group * settings  # int64
    for g in tl.range(first, tl.minimum(first + settings, G), num_stages=1):
        sigmas = ()
        for b in tl.static_range(B):
            sigmas = sigmas + (tl.load(sigma_ptr + g * B + b),)
        params = ()
        for j in tl.static_range(P):
            params = params + (tl.load(param_ptr + g * P + j),)
        sums = ()
        for _ in tl.static_range(3 * VALUES):
            sums = sums + (tl.zeros((QUADS,), tl.float64),)
        for part in tl.static_range(4 * SLICES):
            args = ()
            for b in tl.static_range(B):
                args = args + (sigmas[b] * normals[(part // 4 * B + b) * 4 + part % 4],)
            values = MAP(*args, *params, MODE=MODE)
            mask = draw + (part // 4 * 4 * QUADS + part % 4) < count
            new = ()
            for k in tl.static_range(VALUES):
                v = tl.where(mask, values[k], 0.0).to(tl.float64)  # what a masked draw gives must not reach the sums
                v2 = v * v
                new = new + (pinned(sums[3 * k] + v), pinned(sums[3 * k + 1] + v2), pinned(sums[3 * k + 2] + v2 * v2))
            sums = new
        at = out_ptr + (chunk.to(tl.int64) * G + g) * (3 * VALUES)
        for k in tl.static_range(3 * VALUES):
            tl.store(at + k, tl.sum(sums[k], axis=0))


@dataclass(frozen=True)
class MomentsConfig:
    """Warps of a program and slices of its chunk: what the normals of B branches and the sums of C (1 + B) values leave
    of a thread's registers. The order of the sums depends on it, so it depends on the map alone."""

    num_warps: int
    slices: int


def config(B: int, C: int) -> MomentsConfig:
    if C * (1 + B) <= 2:
        return MomentsConfig(8, 1)
    return MomentsConfig(16, 2) if B <= 2 else MomentsConfig(8, 2)


# ---------------------------------------------------------------- launchers


def _signed(x: int) -> int:
    """The lower 32 bits as a signed number: an argument whose type never depends on its value."""
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >> 31 else x


def settings_of(G: int, chunks: int) -> int:
    """Settings a program takes: as many as leave enough programs."""
    return max(1, min(MAX_SETTINGS, G * chunks // TARGET_PROGRAMS, G))


def launch_moments(
    sigmas, params, out, start: int, samples: int, seed: int, map, settings: int, precision: str
) -> None:
    """out [chunks, G, C (1 + B), 3]; nothing is empty."""
    chunks, G, values, _ = out.shape
    groups = cdiv(G, settings)
    c = config(map.branches, map.outputs)
    quad, last = start // 4, samples - (chunks - 1) * CHUNK
    with on_device(sigmas):
        moments_kernel[(chunks * groups,)](
            sigmas, params, out, G, settings, groups, last, _signed(quad), _signed(quad >> 32), _signed(seed),
            _signed(seed >> 32), MAP=map.triton_jet(), MODE=mode(torch.float32, precision), B=map.branches,
            VALUES=values, P=map.n_params, SLICES=c.slices, BLOCK_M=CHUNK, num_warps=c.num_warps, enable_fp_fusion=True,
        )  # fmt: skip


def moments(
    sigmas: torch.Tensor, params: torch.Tensor, start: int, samples: int, seed: int, map, precision: str = "ieee"
) -> torch.Tensor:
    """Sums over draws s = start .. start + samples - 1 of v, v^2, v^4, for v the outputs y[C] of a map and then, for
    each output, its derivatives with respect to z[B], where z_b = sigma[g, b] n_b[s].

    Args:
        sigmas: [G, B] float32, contiguous.
        params: [G, P] float32, contiguous.
        start: a multiple of 4; start + samples at most 2^63.
        seed: 64 bits, the key of Philox4x32-10; the counter is (s // 4, 64 bits; branch; 0).
        map: an `ActivationMap`: has `branches`, `outputs`, `n_params` and `triton_jet()`.
        precision: of the elementary functions: "tf32" takes the fast ones, anything else the accurate ones.
    Returns:
        [chunks, G, C (1 + B), 3] float64: chunk k has the draws from start + 4096 k on, the last one may be shorter.
    Raises:
        ValueError: start is no multiple of 4, or more than 2^31 - 1 programs.
    """
    if start % 4:
        raise ValueError(f"start: {start} is not a multiple of 4")
    G, chunks = sigmas.shape[0], cdiv(samples, CHUNK)
    out = sigmas.new_empty((chunks, G, map.outputs * (1 + map.branches), 3), dtype=torch.float64)
    if out.numel():
        settings = settings_of(G, chunks)
        if chunks * cdiv(G, settings) > 0x7FFFFFFF:
            raise ValueError(f"samples: {samples} for {G} settings are too many for one call; split them")
        launch_moments(sigmas, params, out, start, samples, seed, map, settings, precision)
    return out


def random_bits(start: int, count: int, branch: int, seed: int, device="cuda") -> torch.Tensor:
    """The 32-bit words of draws start .. start + count - 1 (multiples of 4) of a branch, [count] int64."""
    if start % 4 or count % 4:
        raise ValueError(f"start and count: {start} and {count} are not multiples of 4")
    out = torch.empty(count, dtype=torch.int64, device=device)
    quad = start // 4
    if count:
        with on_device(out):
            random_bits_kernel[(cdiv(count, CHUNK),)](
                out, count, _signed(quad), _signed(quad >> 32), branch, _signed(seed), _signed(seed >> 32),
                BLOCK_Q=CHUNK // 4,
            )  # fmt: skip
    return out
