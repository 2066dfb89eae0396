"""Tile sizes of the Triton kernels: one hand-picked row per architecture, padded head_dim and width of a query element."""

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
        programs_per_sm: persistent programs launched per SM.
        shared_bytes: shared memory of the largest variant compiled with this row; must fit the device.
        decode_split, prefill_split: keys per split.
    """

    prefill_rows: int
    prefill_keys: int
    prefill_stages: int
    decode_keys: int
    decode_stages: int
    num_warps: int
    programs_per_sm: int
    shared_bytes: int = 0
    decode_split: int = 512
    prefill_split: int = 4096


# The interpreter computes whole tiles with numpy: small enough that small tests reach every path.
INTERPRETER = TileConfig(32, 32, 1, 32, 1, 4, 2, decode_split=128, prefill_split=256)

TABLE: dict[tuple[int, int, int], TileConfig] = {
    (90, 64, 2): TileConfig(128, 128, 2, 128, 3, 8, 1),
    (90, 128, 2): TileConfig(128, 64, 3, 64, 3, 8, 1),
    (90, 256, 2): TileConfig(128, 64, 2, 64, 2, 8, 1),
}


def interpreting() -> bool:
    """Whether Triton's kernels, if imported now, would run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def head_pad(head_dim: int) -> int:
    """head_dim as the tiles hold it: the next power of two, at least 16."""
    return max(16, 1 << max(head_dim - 1, 0).bit_length())


def decode_rows(spec: AttentionSpec, config: TileConfig) -> int:
    """Rows of a decode tile: all query heads of a kv head in one tile, 16 or more."""
    return min(max(16, 1 << (spec.group - 1).bit_length()), config.prefill_rows)


ARCHS = (80, 90)
INTERPRETER_ARCH = 0


def arch_of(capability: tuple[int, int]) -> int | None:
    """The table's architecture for a device's compute capability, or None."""
    major, minor = capability
    return 80 if major == 8 else 90 if major == 9 else None


def tiles(spec: AttentionSpec, arch: int) -> TileConfig:
    """The table's row for a model on an architecture (or INTERPRETER_ARCH)."""
    if arch == INTERPRETER_ARCH:
        return INTERPRETER
    return TABLE[arch, max(64, head_pad(spec.head_dim)), spec.dtype.itemsize]
