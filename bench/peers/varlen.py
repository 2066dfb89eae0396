"""torch's varlen_attn: one call for the whole batch, over pages where this torch's version takes a block table."""

from __future__ import annotations

import inspect

import torch

from bench.peers import Call, Peer, Unsupported, bounds, gather, indptr, page_lists, plain
from sarathi_kernels.testing import Inputs


def prepare(inputs: Inputs) -> Call:
    plain(inputs)
    if inputs.spec.dtype not in (torch.bfloat16, torch.float16):
        raise Unsupported(f"varlen_attn takes bfloat16 and float16, got {inputs.spec.dtype}")
    from torch.nn.attention.varlen import varlen_attn

    takes = inspect.signature(varlen_attn).parameters
    spans = bounds(inputs)
    options = {"scale": inputs.spec.softmax_scale} if "scale" in takes else {}
    if "window_size" in takes:
        options["window_size"] = (-1, 0)
    else:
        options["is_causal"] = True
    if "enable_gqa" in takes:
        options["enable_gqa"] = inputs.spec.group > 1
    max_q = max(end - begin for begin, end, _ in spans)
    max_k = max(kv_len for *_, kv_len in spans)
    if "block_table" in takes:
        cu_k = None
        options.update(seqused_k=inputs.seqused_k, block_table=inputs.block_table)
        return lambda: varlen_attn(inputs.q, inputs.k_cache, inputs.v_cache, inputs.cu_seqlens_q, cu_k, max_q, max_k, **options)
    cu_k = indptr([kv_len for *_, kv_len in spans], inputs.q.device)
    lists = page_lists(inputs)

    def call():
        k, v = (
            torch.cat([gather(cache, pages, kv_len) for pages, (_, _, kv_len) in zip(lists, spans)])
            for cache in (inputs.k_cache, inputs.v_cache)
        )
        return varlen_attn(inputs.q, k, v, inputs.cu_seqlens_q, cu_k, max_q, max_k, **options)

    return call


PEERS = [Peer("varlen_attn", "torch varlen_attn, one call; gather included where it takes no block table", ("cuda",), "torch.nn.attention.varlen", prepare)]
