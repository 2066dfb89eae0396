"""Host memory on huge pages, for what is read from end to end in every step: weights and the KV cache.

A decode step reads hundreds of megabytes once; on 4 KiB pages their translations, not their bytes, set the pace.
"""

from __future__ import annotations

import math
import mmap

import torch

HUGE_PAGE = 2 << 20
ALIGNMENT = 64
ARENA_BYTES = 32 << 20


def empty_huge(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """`torch.empty` on huge pages where the system grants them, at a multiple of 2 MiB."""
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    block = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(block, dtype=torch.uint8)
    skip = -memory.data_ptr() % HUGE_PAGE
    return memory[skip : skip + size].view(dtype).view(shape)


class Arena:
    """Many tensors one behind the other on shared huge pages; a block is given back when the last tensor in it is gone."""

    def __init__(self):
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An empty tensor at a multiple of 64 bytes."""
        size = math.prod(shape) * dtype.itemsize
        padded = -(-size // ALIGNMENT) * ALIGNMENT
        if padded > len(self._free):
            self._free = empty_huge((max(padded, ARENA_BYTES),), torch.uint8)
        taken, self._free = self._free[:size], self._free[padded:]
        return taken.view(dtype).view(shape)
