"""Attention for hybrid batches: prefill chunks and decodes over a paged KV cache, in one launch."""

from sarathi_kernels.attention import attention
from sarathi_kernels.backends import backend_reasons
from sarathi_kernels.chunking import aligned_chunk, tile_tokens
from sarathi_kernels.decoder import Decoder, DecoderLayer
from sarathi_kernels.kv_cache import append_kv, empty_kv_cache, slot_mapping, token_positions
from sarathi_kernels.linear import PackedLinear, linear_reason
from sarathi_kernels.merge import merge_states
from sarathi_kernels.plan import AttentionPlan, Limits, Workspace, plan
from sarathi_kernels.spec import AttentionSpec

__version__ = "0.1.0"
__all__ = [
    "AttentionPlan",
    "AttentionSpec",
    "Decoder",
    "DecoderLayer",
    "Limits",
    "PackedLinear",
    "Workspace",
    "aligned_chunk",
    "append_kv",
    "attention",
    "backend_reasons",
    "empty_kv_cache",
    "linear_reason",
    "merge_states",
    "plan",
    "slot_mapping",
    "tile_tokens",
    "token_positions",
]
