"""Combining attention over disjoint sets of keys: the same softmax, computed in parts.

    lse = log sum_s exp(lse_s)        out = sum_s exp(lse_s - lse) * out_s
"""

from __future__ import annotations

import torch

from sarathi_kernels import backends
from sarathi_kernels.attention import LIBRARY

LIBRARY.define("merge_states(Tensor outs, Tensor lses, Tensor(a!) out, Tensor(b!) lse, str backend) -> ()")


def _run(outs, lses, out, lse, backend) -> None:
    backends.get(backend).merge_states(outs, lses, out, lse)


LIBRARY.impl("merge_states", _run, "CompositeExplicitAutograd")
torch.library.register_fake("sarathi::merge_states", lambda *args: None, lib=LIBRARY)


def merge_states(outs: torch.Tensor, lses: torch.Tensor, *, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Merges partial attention results over disjoint keys, as if computed at once.

    Args:
        outs: [num_states, num_tokens, num_heads, head_dim], float32, bfloat16 or float16.
        lses: [num_states, num_tokens, num_heads] float32, natural log; -inf marks a state that saw no key, whose out may
            then hold anything.
        backend: "auto" or a backend's name.

    Returns:
        out [num_tokens, num_heads, head_dim] in the dtype of `outs`, and lse [num_tokens, num_heads] float32. Where no
        state saw a key: 0 and -inf.

    Raises:
        ValueError: a shape, dtype or device is wrong.
    """
    if outs.ndim != 4 or outs.shape[0] == 0 or outs.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"outs must be a float tensor of shape (num_states, num_tokens, num_heads, head_dim) with at least one state, "
            f"got {outs.dtype} {tuple(outs.shape)}"
        )
    if lses.shape != outs.shape[:3] or lses.dtype != torch.float32 or lses.device != outs.device:
        raise ValueError(
            f"lses must be float32 of shape {tuple(outs.shape[:3])} on {outs.device}, got {lses.dtype} {tuple(lses.shape)} on {lses.device}"
        )
    name = backends.select_for(outs.device, outs.dtype, backend)
    out = torch.empty(outs.shape[1:], dtype=outs.dtype, device=outs.device)
    lse = torch.empty(lses.shape[1:], dtype=torch.float32, device=outs.device)
    torch.ops.sarathi.merge_states(outs.contiguous(), lses.contiguous(), out, lse, name)
    return out, lse
