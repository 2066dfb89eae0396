"""vLLM's CPU attention over its paged cache: one launch for the hybrid batch. Its scheduler metadata is made beforehand, like our plan."""

from __future__ import annotations

import functools
import os

import torch

from bench.peers import Call, Peer, Unsupported, bounds, gather, page_lists, paged_table, plain, repage
from sarathi_kernels.memory import empty_huge
from sarathi_kernels.testing import Inputs


@functools.cache
def _ops():
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
    from vllm import _custom_ops
    from vllm.v1.attention.backends import cpu_attn

    if not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        raise Unsupported("the installed vllm has no CPU kernels")
    return _custom_ops, cpu_attn._get_attn_isa


def prepare(inputs: Inputs, page_size: int | None = None) -> Call:
    plain(inputs)
    spec = inputs.spec
    ops, choose_isa = _ops()
    page = page_size or spec.page_size
    isa = choose_isa(spec.dtype, page, spec.head_dim)
    spans = bounds(inputs)
    k_pages, _, lists = repage(inputs, page)
    # One allocation for keys and values of a page, as in vLLM; its own op stores them, in its own inner layout.
    cache = empty_huge((k_pages.shape[0], spec.num_kv_heads, 2 * page, spec.head_dim), spec.dtype)
    k_cache, v_cache = cache.chunk(2, dim=2)
    for pages, mine, (_, _, n) in zip(page_lists(inputs), lists, spans):
        position = torch.arange(n)
        slots = torch.tensor(mine)[position // page] * page + position % page
        ops.cpu_attn_reshape_and_cache(
            gather(inputs.k_cache, pages, n), gather(inputs.v_cache, pages, n), k_cache, v_cache, slots, isa
        )  # fmt: skip
    table, out = paged_table(lists, "cpu"), torch.empty_like(inputs.q)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(spans), num_heads=spec.num_q_heads, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim,
        seq_lens=inputs.seqused_k, dtype=spec.dtype, query_start_loc=inputs.cu_seqlens_q, causal=True,
        sliding_window_size=-1, isa=isa, enable_kv_split=True,
    )  # fmt: skip

    def call():
        ops.cpu_attention_with_kv_cache(
            query=inputs.q, key_cache=k_cache, value_cache=v_cache, output=out, query_start_loc=inputs.cu_seqlens_q,
            seq_lens=inputs.seqused_k, scale=spec.softmax_scale, causal=True, alibi_slopes=None, sliding_window=-1,
            block_table=table, softcap=0.0, scheduler_metadata=metadata, s_aux=None,
        )  # fmt: skip
        return out

    return call


PEERS = [
    Peer("vllm_cpu", "vLLM cpu_attention_with_kv_cache, one launch, the case's page size", ("cpu",), "vllm", prepare),
    Peer("vllm_cpu_p128", "the same on pages of 128, its own default", ("cpu",), "vllm", functools.partial(prepare, page_size=128)),
]
