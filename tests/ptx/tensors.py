"""Random numbers in unusual places."""

import mmap

import torch


def uniform(*shape: int) -> torch.Tensor:
    return torch.rand(shape) * 2 - 1


def spread(shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """Random float32 numbers at strides, in memory that is reserved, but for the most part never touched."""
    size = 4 * (sum((n - 1) * s for n, s in zip(shape, strides)) + 1)
    reserved = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's number, which Python names from 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserved
    memory = mmap.mmap(-1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE, flags=flags)
    return torch.frombuffer(memory, dtype=torch.float32).as_strided(shape, strides).copy_(uniform(*shape))
