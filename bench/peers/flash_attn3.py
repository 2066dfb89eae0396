"""FlashAttention-3 over the same pages: automatic splits, explicit splits with precomputed scheduler metadata, and two calls."""

from __future__ import annotations


import torch

from bench.peers import Call, Peer, Unsupported, bounds, plain
from sarathi_kernels.testing import Inputs

MAX_SPLITS = 128


def _needs_sm90(inputs: Inputs) -> None:
    plain(inputs)
    if torch.cuda.get_device_capability(inputs.q.device)[0] != 9:
        raise Unsupported("FlashAttention-3 is for compute capability 9.0")


def _call(inputs: Inputs, out_rows: slice | None, requests: slice, **options):
    """One flash_attn_with_kvcache over a contiguous range of requests."""
    from flash_attn_interface import flash_attn_with_kvcache

    q = inputs.q if out_rows is None else inputs.q[out_rows]
    cu = inputs.cu_seqlens_q[requests.start : requests.stop + 1] - inputs.cu_seqlens_q[requests.start]
    spans = bounds(inputs)[requests]
    fixed = dict(
        cache_seqlens=inputs.seqused_k[requests], page_table=inputs.block_table[requests].contiguous(), cu_seqlens_q=cu,
        max_seqlen_q=max(end - begin for begin, end, _ in spans), softmax_scale=inputs.spec.softmax_scale, causal=True, **options,
    )  # fmt: skip
    return lambda: flash_attn_with_kvcache(q, inputs.k_cache, inputs.v_cache, **fixed)


def one_call(inputs: Inputs) -> Call:
    """The library chooses the number of splits, for the whole batch at once."""
    _needs_sm90(inputs)
    return _call(inputs, None, slice(0, len(inputs.seqused_k)))


def explicit_splits(inputs: Inputs) -> Call:
    """Splits so many that the decodes alone would fill the machine, with metadata computed beforehand."""
    _needs_sm90(inputs)
    from flash_attn_interface import get_scheduler_metadata

    spec, spans = inputs.spec, bounds(inputs)
    decodes = sum(end - begin == 1 for begin, end, _ in spans)
    if not decodes:
        raise Unsupported("no decode in the batch: nothing to split")
    processors = torch.cuda.get_device_properties(inputs.q.device).multi_processor_count
    splits = max(2, min(MAX_SPLITS, -(-2 * processors // (decodes * spec.num_kv_heads))))
    metadata = get_scheduler_metadata(
        len(spans), max(end - begin for begin, end, _ in spans), max(n for *_, n in spans), spec.num_q_heads, spec.num_kv_heads,
        spec.head_dim, inputs.seqused_k, qkv_dtype=spec.dtype, cu_seqlens_q=inputs.cu_seqlens_q, page_size=spec.page_size,
        causal=True, num_splits=splits,
    )  # fmt: skip
    return _call(inputs, None, slice(0, len(spans)), num_splits=splits, scheduler_metadata=metadata)


def two_calls(inputs: Inputs) -> Call:
    """Chunks in one launch, decodes in another: the baseline that a hybrid launch has to beat."""
    _needs_sm90(inputs)
    spans = bounds(inputs)
    kinds = [end - begin == 1 for begin, end, _ in spans]
    border = kinds.index(True) if True in kinds else len(kinds)
    if border in (0, len(kinds)) or not all(kinds[border:]):
        raise Unsupported("two calls need chunks first, then decodes")
    row = spans[border][0]
    chunk = _call(inputs, slice(0, row), slice(0, border))
    decode = _call(inputs, slice(row, None), slice(border, len(spans)))
    out = torch.empty_like(inputs.q)

    def call():
        out[:row], out[row:] = chunk(), decode()
        return out

    return call


PEERS = [
    Peer("fa3", "FlashAttention-3, one call, automatic splits", ("cuda",), "flash_attn_interface", one_call),
    Peer("fa3_splits", "FlashAttention-3, one call, explicit splits, scheduler metadata made beforehand", ("cuda",), "flash_attn_interface", explicit_splits),
    Peer("fa3_two_calls", "FlashAttention-3, one call for the chunks and one for the decodes", ("cuda",), "flash_attn_interface", two_calls),
]
