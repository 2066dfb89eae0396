"""Linear layers without bias, their weights laid out once for the machine's matmul."""

from __future__ import annotations

from collections.abc import Callable

import torch

Linear = Callable[[torch.Tensor], torch.Tensor]
# The packed layout is chosen for about a step's worth of tokens; it serves any number.
PACK_ROWS = 256


def make_linear(weight: torch.Tensor, kind: str = "dense") -> Linear:
    """A function x [n, in_features] -> x @ weight.T [n, out_features], in x's dtype.

    Args:
        weight: [out_features, in_features].
        kind: "dense" or "int8", see `EngineConfig.linear`.
    """
    if weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return lambda x: torch.nn.functional.linear(x, weight)
