"""Linear layers of a step on the CPU, with what surrounds them in a decoder fused in: RMSNorm before, SwiGLU or a residual after.

    y = epilogue(rms_norm(x) @ weight.T)

On CPUs with AVX512_VNNI and AVX512_BF16 (`linear_reason` says whether this one has them).
"""

from __future__ import annotations

import struct

import torch

from sarathi_kernels import _native
from sarathi_kernels.memory import Arena

_PARAMS = struct.Struct("@5P 2q 3i i f 0q")  # LinearParams in csrc/cpu/linear.h; the native side checks the size
STORE, ADD, SWIGLU, FLOAT = range(4)  # Epilogue in linear.h
KINDS = ("bfloat16", "int8")
_arena = Arena()


def linear_reason(out_features: int, in_features: int) -> str | None:
    """None if `PackedLinear` can do such a layer here, else why not."""
    if not _native.cpu_has_linear():
        return "this CPU lacks AVX512_VNNI or AVX512_BF16"
    if out_features % 32 or in_features % 16:
        return f"out_features must be a multiple of 32 and in_features of 16, got {out_features} and {in_features}"
    return None


class PackedLinear:
    """A layer without bias whose weights are packed once.

    Args:
        weight: [out_features, in_features]; with `swiglu` the first half of the rows are gates, the second half ups.
        kind: "bfloat16", or "int8": weights with one scale per output row, activations with one per token (largest
            absolute value / 127), int32 sums.
        norm: [in_features], weight of an RMSNorm of the input; None is no norm.
        eps: of the norm.
        swiglu: the output is silu(gate) * up, [tokens, out_features / 2].

    Raises:
        ValueError: `linear_reason` has one, or the kind is unknown.
    """

    def __init__(self, weight: torch.Tensor, kind: str, *, norm: torch.Tensor | None = None, eps: float = 0.0, swiglu: bool = False):
        n, k = weight.shape
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if reason := linear_reason(n, k):
            raise ValueError(f"no packed linear: {reason}")
        if norm is not None and norm.shape != (k,):
            raise ValueError(f"norm must have shape ({k},), got {tuple(norm.shape)}")
        if swiglu:  # 16 gates, their 16 ups, the next 16 gates, ...
            weight = weight.view(2, n // 32, 16, k).transpose(0, 1).reshape(n, k)
        self.out_features, self.in_features, self.eps, self.swiglu = n, k, eps, swiglu
        self._norm = None if norm is None else norm.float().contiguous()
        self._scale = None
        depth = 2
        if kind == "int8":
            weight, depth = weight.float(), 4
            self._scale = weight.abs().amax(1).clamp(min=1e-30) / 127
            weight = torch.round(weight / self._scale.unsqueeze(1)).add_(128).to(torch.uint8)
        packed = weight.to(torch.uint8 if kind == "int8" else torch.bfloat16).view(n // 32, 32, k // depth, depth).permute(0, 2, 1, 3)
        self._packed = _arena.take(packed.shape, packed.dtype).copy_(packed)

    def __call__(self, x: torch.Tensor, *, add_to: torch.Tensor | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """Runs the layer.

        Args:
            x: [tokens, in_features] bfloat16, innermost stride 1.
            add_to: [tokens, out_features] bfloat16, other memory than x: the result is added to it in place, and it is returned.
            out: [tokens, width] bfloat16 or float32, other memory than x, width being out_features or, for SwiGLU, half of it:
                written in place.

        Raises:
            ValueError: a shape or dtype is wrong, or more than one of SwiGLU, `add_to` and float32 is asked for.
        """
        tokens, width = x.shape[0], self.out_features // 2 if self.swiglu else self.out_features
        if x.shape != (tokens, self.in_features) or x.dtype != torch.bfloat16 or x.stride(1) != 1 or x.device.type != "cpu":
            raise ValueError(f"x must be bfloat16 of shape (tokens, {self.in_features}) on the CPU with innermost stride 1, got {x.dtype} {tuple(x.shape)}")
        if self.swiglu + (out is not None and out.dtype == torch.float32) + (add_to is not None) > 1 or (add_to is not None and out is not None):
            raise ValueError("a linear has one epilogue: swiglu, add_to or a float32 out")
        name, to, kinds = ("out", out, (torch.bfloat16, torch.float32)) if add_to is None else ("add_to", add_to, (torch.bfloat16,))
        if to is None:
            to = torch.empty((tokens, width), dtype=torch.bfloat16)
        elif to.shape != (tokens, width) or to.dtype not in kinds or to.stride(1) != 1 or to.data_ptr() == x.data_ptr() != 0:
            raise ValueError(
                f"{name} must be {' or '.join(map(str, kinds))} of shape {(tokens, width)} with innermost stride 1 and not x itself, "
                f"got {to.dtype} {tuple(to.shape)}"
            )
        epilogue = SWIGLU if self.swiglu else FLOAT if to.dtype == torch.float32 else STORE if add_to is None else ADD
        _native.cpu_linear(self.pack(x, to, epilogue), torch.get_num_threads())
        return to

    def pack(self, x: torch.Tensor, out: torch.Tensor, epilogue: int) -> bytes:
        """The argument block of one call, unchecked. It holds addresses: the layer and the tensors must outlive it."""
        return _PARAMS.pack(
            x.data_ptr(), *self.addresses(), out.data_ptr(),
            x.stride(0), out.stride(0), x.shape[0], self.out_features, self.in_features, epilogue, self.eps,
        )  # fmt: skip

    def addresses(self) -> tuple[int, int, int]:
        """Where the norm, the packed weights and their scales are; 0 is none."""
        return _address(self._norm), self._packed.data_ptr(), _address(self._scale)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
