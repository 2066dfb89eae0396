"""FlashInfer's wrappers over the same pages (layout NHD): BatchPrefill (fa2, fa3), BatchAttention, POD and BatchPOD."""

from __future__ import annotations

import functools

import torch

from bench.peers import Call, Peer, Unsupported, bounds, gather, indptr, page_lists, plain
from sarathi_kernels.testing import Inputs

WORKSPACE_BYTES = 512 << 20


@functools.cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _pages(inputs: Inputs, requests=None):
    """kv_indptr, kv_indices, last_page_len of the chosen requests (default: all), as FlashInfer spells a page table."""
    spans, lists, device, size = bounds(inputs), page_lists(inputs), inputs.q.device, inputs.spec.page_size
    requests = range(len(spans)) if requests is None else requests
    last = torch.tensor([(spans[i][2] - 1) % size + 1 for i in requests], dtype=torch.int32, device=device)
    return indptr([len(lists[i]) for i in requests], device), torch.cat([lists[i] for i in requests]).to(torch.int32), last


def _model(inputs: Inputs) -> dict:
    spec = inputs.spec
    return {"num_qo_heads": spec.num_q_heads, "num_kv_heads": spec.num_kv_heads, "page_size": spec.page_size, "sm_scale": spec.softmax_scale}


def batch_prefill(inputs: Inputs, *, backend: str) -> Call:
    plain(inputs)
    import flashinfer

    if backend == "fa3" and torch.cuda.get_device_capability(inputs.q.device)[0] != 9:
        raise Unsupported("the fa3 backend is for compute capability 9.0")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(inputs.q.device), "NHD", backend=backend)
    wrapper.plan(
        inputs.cu_seqlens_q, *_pages(inputs), head_dim_qk=inputs.spec.head_dim, causal=True,
        q_data_type=inputs.spec.dtype, kv_data_type=inputs.spec.dtype, **_model(inputs),
    )  # fmt: skip
    out = torch.empty_like(inputs.q)
    return lambda: wrapper.run(inputs.q, (inputs.k_cache, inputs.v_cache), out=out)


def batch_attention(inputs: Inputs) -> Call:
    plain(inputs)
    import flashinfer

    wrapper = flashinfer.BatchAttention(kv_layout="NHD", device=str(inputs.q.device))
    kv_indptr, kv_indices, _ = _pages(inputs)
    wrapper.plan(
        inputs.cu_seqlens_q, kv_indptr, kv_indices, inputs.seqused_k, head_dim_qk=inputs.spec.head_dim,
        head_dim_vo=inputs.spec.head_dim, causal=True, logits_soft_cap=0.0,
        q_data_type=inputs.spec.dtype, kv_data_type=inputs.spec.dtype, **_model(inputs),
    )  # fmt: skip
    return lambda: wrapper.run(inputs.q, (inputs.k_cache, inputs.v_cache), logits_soft_cap=0.0)[0]


def _split(inputs: Inputs):
    """Chunks and decodes, as POD wants them: in that order and contiguous in q."""
    spans = bounds(inputs)
    chunks = [i for i, (begin, end, _) in enumerate(spans) if end - begin > 1]
    decodes = [i for i, (begin, end, _) in enumerate(spans) if end - begin == 1]
    if not chunks or not decodes:
        raise Unsupported("POD wants both chunks and decodes in the batch")
    if chunks + decodes != list(range(len(spans))):
        raise Unsupported("POD wants the chunks first, then the decodes")
    return spans, chunks, decodes, spans[decodes[0]][0]


def pod(inputs: Inputs) -> Call:
    plain(inputs)
    import flashinfer

    spans, chunks, decodes, border = _split(inputs)
    if len(chunks) != 1:
        raise Unsupported(f"single POD takes one prefill, got {len(chunks)}")
    wrapper = flashinfer.PODWithPagedKVCacheWrapper(_workspace(inputs.q.device), "NHD")
    wrapper.plan(
        *_pages(inputs, decodes), head_dim=inputs.spec.head_dim, q_data_type=inputs.spec.dtype, kv_data_type=inputs.spec.dtype,
        **_model(inputs),
    )  # fmt: skip
    pages, kv_len, out = page_lists(inputs)[0], spans[0][2], torch.empty_like(inputs.q)

    def call():
        k, v = (gather(cache, pages, kv_len) for cache in (inputs.k_cache, inputs.v_cache))
        out[:border], out[border:] = wrapper.run(
            inputs.q[:border], k, v, inputs.q[border:], (inputs.k_cache, inputs.v_cache),
            causal_p=True, sm_scale_p=inputs.spec.softmax_scale,
        )  # fmt: skip
        return out

    return call


def batch_pod(inputs: Inputs) -> Call:
    plain(inputs)
    import flashinfer

    spans, chunks, decodes, border = _split(inputs)
    wrapper = flashinfer.BatchPODWithPagedKVCacheWrapper(_workspace(inputs.q.device), "NHD")
    device = inputs.q.device
    wrapper.plan(
        indptr([spans[i][1] - spans[i][0] for i in chunks], device), *_pages(inputs, chunks),
        indptr([1] * len(decodes), device), *_pages(inputs, decodes),
        head_dim=inputs.spec.head_dim, q_data_type=inputs.spec.dtype, kv_data_type=inputs.spec.dtype, **_model(inputs),
    )  # fmt: skip
    cache, out = (inputs.k_cache, inputs.v_cache), torch.empty_like(inputs.q)

    def call():
        out[:border], out[border:] = wrapper.run(inputs.q[:border], cache, inputs.q[border:], cache, causal_p=True)
        return out

    return call


def _peer(name, how, prepare):
    return Peer(f"flashinfer_{name}", how, ("cuda",), "flashinfer", prepare)


PEERS = [
    _peer("fa2", "FlashInfer BatchPrefillWithPagedKVCache, fa2", functools.partial(batch_prefill, backend="fa2")),
    _peer("fa3", "FlashInfer BatchPrefillWithPagedKVCache, fa3", functools.partial(batch_prefill, backend="fa3")),
    _peer("batch_attention", "FlashInfer BatchAttention", batch_attention),
    _peer("pod", "FlashInfer POD, one prefill, its gather included", pod),
    _peer("batch_pod", "FlashInfer BatchPOD", batch_pod),
]
