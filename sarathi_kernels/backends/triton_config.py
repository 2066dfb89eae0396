"""Tile sizes of the Triton kernels: one hand-picked row per architecture, padded head_dim and widths of query and cache.

Where the numbers come from: each row is the largest candidate that compiles without spilling in every variant (window, softcap,
sinks and tree mask, all at once and none) for sm_80 and sm_90 with Triton 3.6 and 3.7. None has been timed on a GPU. The candidates
differed in rows, keys and stages only; 8 warps because 128 rows in 4 spilled everywhere with head_dim 128. `shared_bytes`
is the compiler's figure, held by tests/test_triton_compile.py together with the registers.

Hypotheses for whoever has a GPU, in the order to try them: tensor descriptors (TMA) for K and V where the page holds whole
blocks of keys, which would also free the address registers that keep head_dim 256 at 64 rows; warp specialisation of the key
loops; 128 rows at head_dim 256 in spite of 16 spilled bytes, all outside the loops; two programs per SM for head_dim 64;
the wait after each wgmma (the PTX waits for all of them) hidden by computing the next block's scores before this one's output.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from sarathi_kernels.spec import AttentionSpec


class TileConfig(NamedTuple):
    """One row of the table.

    Attributes:
        prefill_rows, prefill_keys, prefill_stages: packed rows and keys of a prefill tile; buffers of its load pipeline.
        decode_keys, decode_stages: the same of a decode tile, whose rows follow from the model (`decode_rows`).
        num_warps: of a program, for both classes.
        shared_bytes: shared memory of the largest variant; must fit the device.
        max_registers: a limit for the compiler, where without one it stops at a lower step and spills for it.
        programs_per_sm: persistent programs launched per SM.
        decode_split, prefill_split: keys per split.
    """

    prefill_rows: int
    prefill_keys: int
    prefill_stages: int
    decode_keys: int
    decode_stages: int
    num_warps: int
    shared_bytes: int
    max_registers: int | None = None
    programs_per_sm: int = 1
    decode_split: int = 512
    prefill_split: int = 4096


# (architecture, head_pad, bytes of a query element, bytes of a cache element)
TABLE: dict[tuple[int, int, int, int], TileConfig] = {
    (90, 64, 2, 2): TileConfig(128, 64, 3, 128, 3, 8, 49408),
    (90, 64, 2, 1): TileConfig(128, 32, 3, 64, 3, 8, 32768),
    (90, 64, 4, 4): TileConfig(64, 32, 2, 32, 3, 8, 41216),
    (90, 128, 2, 2): TileConfig(128, 64, 3, 64, 3, 8, 98560),
    (90, 128, 2, 1): TileConfig(128, 32, 2, 32, 3, 8, 65536),
    (90, 128, 4, 4): TileConfig(64, 32, 2, 32, 2, 8, 73728),
    (90, 256, 2, 2): TileConfig(64, 32, 3, 32, 3, 8, 98432),
    (90, 256, 2, 1): TileConfig(32, 32, 2, 32, 2, 8, 35072),
    (90, 256, 4, 4): TileConfig(32, 16, 2, 16, 2, 8, 67712),
    (80, 64, 2, 2): TileConfig(128, 32, 3, 64, 3, 8, 32768),
    (80, 64, 2, 1): TileConfig(32, 32, 2, 32, 2, 8, 10496),
    (80, 64, 4, 4): TileConfig(64, 32, 2, 32, 2, 8, 41216, max_registers=255),
    (80, 128, 2, 2): TileConfig(128, 32, 3, 64, 3, 8, 65536),
    (80, 128, 2, 1): TileConfig(128, 32, 2, 32, 3, 8, 65536),
    (80, 128, 4, 4): TileConfig(32, 32, 2, 32, 2, 8, 53248),
    (80, 256, 2, 2): TileConfig(64, 32, 2, 32, 3, 8, 69632),
    (80, 256, 2, 1): TileConfig(32, 32, 2, 32, 2, 8, 35072),
    (80, 256, 4, 4): TileConfig(32, 16, 1, 16, 1, 8, 51328, max_registers=255),
}
ARCHS = (80, 90)

# The interpreter computes whole tiles with numpy: small enough that small tests reach every path.
INTERPRETER_ARCH = 0
INTERPRETER = TileConfig(32, 32, 1, 32, 1, 4, 0, programs_per_sm=2, decode_split=128, prefill_split=256)


def interpreting() -> bool:
    """Whether Triton's kernels, if imported now, would run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def arch_of(capability: tuple[int, int]) -> int | None:
    """The table's architecture for a device's compute capability, or None."""
    return {8: 80, 9: 90}.get(capability[0])


def tiles(spec: AttentionSpec, arch: int) -> TileConfig:
    """The table's row for a model on an architecture (or INTERPRETER_ARCH)."""
    if arch == INTERPRETER_ARCH:
        return INTERPRETER
    return TABLE[arch, max(64, head_pad(spec.head_dim)), spec.dtype.itemsize, spec.kv_dtype.itemsize]


def head_pad(head_dim: int) -> int:
    """head_dim as the tiles hold it: the next power of two, at least 16."""
    return max(16, 1 << max(head_dim - 1, 0).bit_length())


def decode_rows(spec: AttentionSpec, config: TileConfig) -> int:
    """Rows of a decode tile: a token's query heads of one kv head. More than 32 would spill; such models use prefill tiles."""
    return 32 if 16 < spec.group <= 32 and config.prefill_rows >= 32 else 16
