"""What a model's attention looks like: fixed once per model, checked once."""

from __future__ import annotations

import dataclasses
import math

import torch

QUERY_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
KV_DTYPES = QUERY_DTYPES + (torch.int8, torch.float8_e4m3fn)


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The attention of one model, shared by all its layers and steps.

    Attributes:
        num_q_heads: query heads.
        num_kv_heads: key/value heads; must divide `num_q_heads` (grouped-query attention).
        head_dim: elements per head, of queries, keys and values alike.
        page_size: tokens per page of the KV cache, 1 or more.
        dtype: of queries and output.
        kv_dtype: of the cache; defaults to `dtype`. `torch.int8` stores one float32 scale per token and kv head beside
            the pages, `torch.float8_e4m3fn` takes one per kv head; both scales are arguments of `append_kv` and
            `attention`.
        causal: bottom-right aligned causal mask: the last query of a request sees its last key.
        window_left: a query sees at most this many keys before its own position; -1 means all.
        softcap: scores become `softcap * tanh(score / softcap)`; 0 means off.
        sinks: the model has attention sinks: `attention` then wants one logit per query head, which joins the softmax's
            denominator and nothing else.
        softmax_scale: factor on `q @ k`; defaults to `head_dim ** -0.5`.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 16
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    causal: bool = True
    window_left: int = -1
    softcap: float = 0.0
    sinks: bool = False
    softmax_scale: float | None = None

    def __post_init__(self):
        for name in ("num_q_heads", "num_kv_heads", "head_dim", "page_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_q_heads, got {self.num_q_heads} query heads and {self.num_kv_heads} kv heads"
            )
        if self.kv_dtype is None:
            object.__setattr__(self, "kv_dtype", self.dtype)
        if self.softmax_scale is None:
            object.__setattr__(self, "softmax_scale", self.head_dim**-0.5)
        if self.dtype not in QUERY_DTYPES:
            raise ValueError(f"dtype must be one of {_names(QUERY_DTYPES)}, got {self.dtype}")
        if self.kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype must be one of {_names(KV_DTYPES)}, got {self.kv_dtype}")
        if self.kv_dtype != self.dtype and not self.quantized_kv:
            raise ValueError(f"kv_dtype must equal dtype {self.dtype} or be a quantized type, got {self.kv_dtype}")
        if not isinstance(self.window_left, int) or self.window_left < -1:
            raise ValueError(f"window_left must be -1 (no window) or a count of keys, got {self.window_left!r}")
        if not (math.isfinite(self.softcap) and self.softcap >= 0):
            raise ValueError(f"softcap must be 0 (off) or positive, got {self.softcap!r}")
        if not math.isfinite(self.softmax_scale):
            raise ValueError(f"softmax_scale must be finite, got {self.softmax_scale!r}")

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def quantized_kv(self) -> bool:
        return self.kv_dtype in (torch.int8, torch.float8_e4m3fn)

    def kv_cache_shape(self, num_pages: int) -> tuple[int, int, int, int]:
        """Shape of `k_cache` and of `v_cache`: [num_pages, page_size, num_kv_heads, head_dim]."""
        return (num_pages, self.page_size, self.num_kv_heads, self.head_dim)

    def kv_scale_shape(self, num_pages: int) -> tuple[int, ...] | None:
        """Shape of `k_scale` and of `v_scale` (float32), or None where the cache needs none."""
        if self.kv_dtype == torch.int8:
            return (num_pages, self.page_size, self.num_kv_heads)
        if self.kv_dtype == torch.float8_e4m3fn:
            return (self.num_kv_heads,)
        return None


def _names(dtypes) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)
