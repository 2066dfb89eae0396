"""Linear layers with what surrounds them in a decoder: an RMSNorm before, SwiGLU or a residual after."""

from __future__ import annotations

from typing import Protocol

import sarathi_kernels as sk
import torch
from torch.nn import functional


class Linear(Protocol):
    """y = epilogue(norm(x) @ weight.T)."""

    def __call__(self, x: torch.Tensor, *, add_to: torch.Tensor | None = None) -> torch.Tensor:
        """x: [tokens, in_features]. With `add_to` the result is added to it in place, and it is returned."""


class TorchLinear:
    """The layer in torch's ops, for every dtype and machine. Arguments as for `make_linear`."""

    def __init__(self, weight: torch.Tensor, norm: torch.Tensor | None = None, eps: float = 0.0, swiglu: bool = False):
        self.weight, self.norm, self.eps, self.swiglu = weight, norm, eps, swiglu

    def __call__(self, x: torch.Tensor, *, add_to: torch.Tensor | None = None) -> torch.Tensor:
        if self.norm is not None:
            x = functional.rms_norm(x, self.norm.shape, self.norm, self.eps)
        y = functional.linear(x, self.weight)
        if self.swiglu:
            gate, up = y.chunk(2, dim=-1)
            y = functional.silu(gate).mul_(up)
        return y if add_to is None else add_to.add_(y)


def make_linear(
    weight: torch.Tensor, kind: str = "dense", *, norm: torch.Tensor | None = None, eps: float = 0.0, swiglu: bool = False
) -> Linear:
    """The layer, in the machine's own kernels where it has them.

    Args:
        weight: [out_features, in_features]; with `swiglu` the first half of the rows are gates, the second half ups.
        kind: "dense" or "int8", see `EngineConfig.linear`.
        norm: [in_features], weight of the RMSNorm before; None is no norm.
        eps: of the norm.
        swiglu: the output is silu(gate) * up.

    Raises:
        ValueError: int8 was asked for where weights are not bfloat16 or the machine has no kernel for it, with the reason.
    """
    reason = sk.linear_reason(*weight.shape) if weight.dtype == torch.bfloat16 else f"weights are {weight.dtype}, not bfloat16"
    if reason is None:
        return sk.PackedLinear(weight, "int8" if kind == "int8" else "bfloat16", norm=norm, eps=eps, swiglu=swiglu)
    if kind == "int8":
        raise ValueError(f"linear int8 is not possible here: {reason}")
    return TorchLinear(weight, norm, eps, swiglu)
