"""torch's scaled_dot_product_attention on gathered pages: per request, batched by kind, and through cuDNN."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from bench.peers import Call, Peer, bounds, gather, page_lists, plain
from sarathi_kernels.testing import Inputs


def _masking(q_len: int, kv_len: int, device: torch.device, *, boolean: bool) -> dict:
    """Arguments that give a chunk its bottom-right causal mask. A decode needs none, a whole prompt no tensor."""
    if q_len == 1:
        return {}
    if q_len == kv_len:
        return {"is_causal": True}
    if not boolean:
        return {"attn_mask": causal_lower_right(q_len, kv_len)}
    keys, rows = torch.arange(kv_len, device=device), torch.arange(q_len, device=device)
    return {"attn_mask": keys[None, :] <= (kv_len - q_len + rows)[:, None]}


def per_request(inputs: Inputs, *, boolean: bool | None = None) -> Call:
    """One gather and one SDPA call with enable_gqa per request."""
    plain(inputs)
    # On CUDA a mask tensor would keep flash attention from being chosen; on a CPU the lower-right bias becomes a tensor anyway.
    boolean = inputs.q.device.type == "cpu" if boolean is None else boolean
    work = [
        (begin, end, kv_len, pages, _masking(end - begin, kv_len, inputs.q.device, boolean=boolean))
        for (begin, end, kv_len), pages in zip(bounds(inputs), page_lists(inputs))
        if end > begin
    ]
    out = torch.empty_like(inputs.q)

    def call():
        for begin, end, kv_len, pages, masking in work:
            k, v = (gather(cache, pages, kv_len).transpose(0, 1).unsqueeze(0) for cache in (inputs.k_cache, inputs.v_cache))
            q = inputs.q[begin:end].transpose(0, 1).unsqueeze(0)
            o = scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=inputs.spec.softmax_scale, **masking)
            out[begin:end] = o[0].transpose(0, 1)
        return out

    return call


def batched(inputs: Inputs) -> Call:
    """All decodes in one padded call, query heads of a group as query rows; every chunk in a call of its own."""
    plain(inputs)
    spec, device = inputs.spec, inputs.q.device
    spans = bounds(inputs)
    single = [i for i, (begin, end, _) in enumerate(spans) if end - begin == 1]
    out = torch.empty_like(inputs.q)
    calls = []
    if single:
        rows = torch.tensor([spans[i][0] for i in single], device=device)
        lens = inputs.seqused_k[single]
        longest = int(lens.max())
        table = inputs.block_table[single, : -(-longest // spec.page_size)].long()
        keys = torch.arange(longest, device=device)
        ragged = bool((lens != longest).any())
        mask = (keys[None, :] < lens[:, None])[:, None, None, :] if ragged else None

        def run_decodes():
            k, v = (cache[table].flatten(1, 2)[:, :longest].transpose(1, 2) for cache in (inputs.k_cache, inputs.v_cache))
            q = inputs.q[rows].unflatten(1, (spec.num_kv_heads, spec.group))
            out[rows] = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=spec.softmax_scale).flatten(1, 2)

        calls.append(run_decodes)
    for i, pages in enumerate(page_lists(inputs)):
        begin, end, kv_len = spans[i]
        if end - begin < 2:
            continue
        masking = _masking(end - begin, kv_len, device, boolean=device.type == "cpu")

        def run_chunk(begin=begin, end=end, kv_len=kv_len, pages=pages, masking=masking):
            k, v = (gather(cache, pages, kv_len).transpose(0, 1).unsqueeze(0) for cache in (inputs.k_cache, inputs.v_cache))
            q = inputs.q[begin:end].transpose(0, 1).unsqueeze(0)
            out[begin:end] = scaled_dot_product_attention(
                q, k, v, enable_gqa=True, scale=spec.softmax_scale, **masking
            )[0].transpose(0, 1)  # fmt: skip

        calls.append(run_chunk)

    def call():
        for run in calls:
            run()
        return out

    return call


def cudnn(inputs: Inputs) -> Call:
    """`per_request`, with cuDNN's attention as the only backend torch may choose."""
    inner = per_request(inputs, boolean=True)

    def call():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return inner()

    return call


PEERS = [
    Peer("sdpa", "torch SDPA, enable_gqa, one call per request, gather included", ("cpu", "cuda"), "torch", per_request),
    Peer("sdpa_batched", "torch SDPA, one padded call for all decodes, one per chunk, gather included", ("cpu", "cuda"), "torch", batched),
    Peer("cudnn", "torch SDPA through cuDNN, one call per request, gather included", ("cuda",), "torch", cudnn),
]
