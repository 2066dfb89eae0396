"""Chunk sizes that fill the kernel's tiles. A token over a tile's edge costs a whole tile (257 tokens like 384)."""

from __future__ import annotations

import math

from sarathi_kernels import backends
from sarathi_kernels.spec import AttentionSpec


def tile_tokens(spec: AttentionSpec, backend: str = "reference") -> int:
    """Query tokens in the smallest whole number of prefill tiles that ends on a token boundary.

    A prefill tile holds `prefill_rows` packed rows (token x head of the group). With a group that divides it that is
    prefill_rows / group tokens in one tile; with one that does not (group 3, say) the first boundary that coincides with
    a token's is several tiles away.

    Args:
        spec: the model's attention.
        backend: whose tiles: a backend's name.
    """
    rows = backends.get(backend).plan_config(spec).prefill_rows
    return rows // math.gcd(rows, spec.group)


def aligned_chunk(remaining: int, budget: int, tile: int) -> int:
    """The largest chunk of a prompt that fits the budget and ends on a tile boundary, or ends the prompt.

    Args:
        remaining: prompt tokens not yet computed.
        budget: tokens left in this step's token budget (decodes already taken off); may be negative.
        tile: from `tile_tokens`, or any other granularity; positive.

    Returns:
        `remaining` if it fits; else the largest multiple of `tile` within the budget; else, when the budget is smaller
        than one tile, the budget itself (progress beats alignment), never below 0.
    """
    if tile < 1 or remaining < 0:
        raise ValueError(f"tile must be positive and remaining not negative, got tile={tile}, remaining={remaining}")
    if remaining <= budget:
        return remaining
    if budget <= 0:
        return 0
    return budget - budget % tile or budget
