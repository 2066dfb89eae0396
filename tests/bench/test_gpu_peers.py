"""The adaptors for GPU libraries, against stand-ins with those libraries' signatures that compute with the oracle.

What this shows: that an adaptor describes the batch truly (page lists, lengths, which rows are whose) and calls with arguments that
exist. What it cannot show: that the library's version on some machine has these signatures, or is right.
"""

import sys
import types

import pytest
import torch

from bench import attention, cases, peers
from bench.peers import flash_attn3, flashinfer_wrappers, vllm_triton
from sarathi_kernels import testing
from sarathi_kernels.backends import reference

SPEC = cases.MODELS["smollm2"]
MIXED = ((20, 45), (1, 33), (1, 16))
BATCHES = {"mixed": MIXED, "two_chunks": ((20, 45), (17, 17), (1, 33), (1, 64)), "decodes": ((1, 33), (1, 16), (1, 5)), "chunk": ((20, 45),)}


def dense(q, k_cache, v_cache, cu, lens, table, scale):
    spec = testing.make_spec((q.shape[1], k_cache.shape[2]), q.shape[2], page_size=k_cache.shape[1], softmax_scale=scale, dtype=q.dtype)
    return reference.dense_attention(spec, q, k_cache, v_cache, cu, lens, table)[0].to(q.dtype)


def from_page_lists(q, caches, qo_indptr, kv_indptr, kv_indices, lens, scale):
    counts = (kv_indptr[1:] - kv_indptr[:-1]).tolist()
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    for i, n in enumerate(counts):
        table[i, :n] = kv_indices[kv_indptr[i] : kv_indptr[i] + n]
    assert qo_indptr.dtype == kv_indptr.dtype == kv_indices.dtype == torch.int32
    return dense(q, *caches, qo_indptr, lens, table, scale)


def lengths(kv_indptr, last_page_len, page_size):
    return ((kv_indptr[1:] - kv_indptr[:-1] - 1) * page_size + last_page_len).to(torch.int32)


class BatchPrefill:
    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, backend="auto"):
        assert kv_layout == "NHD" and backend in ("fa2", "fa3")

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim_qk, page_size, *,
        causal=False, sm_scale=None, window_left=-1, logits_soft_cap=None, q_data_type="float16", kv_data_type=None,
    ):  # fmt: skip
        assert causal and (num_qo_heads, num_kv_heads, head_dim_qk) == (9, 3, 64)
        lens = lengths(paged_kv_indptr, paged_kv_last_page_len, page_size)
        self.planned = (qo_indptr, paged_kv_indptr, paged_kv_indices, lens, sm_scale)

    def run(self, q, paged_kv_cache, *args, out=None, lse=None, return_lse=False):
        return out.copy_(from_page_lists(q, paged_kv_cache, *self.planned))


class BatchAttention:
    def __init__(self, kv_layout="NHD", device="cuda"):
        pass

    def plan(
        self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size, causal=False,
        sm_scale=None, logits_soft_cap=None, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16, use_profiler=False,
    ):  # fmt: skip
        assert causal
        self.planned = (qo_indptr, kv_indptr, kv_indices, kv_len_arr, sm_scale)

    def run(self, q, kv_cache, out=None, lse=None, logits_soft_cap=None, profiler_buffer=None):
        assert not logits_soft_cap > 0.0
        return from_page_lists(q, kv_cache, *self.planned), None


class Pod:
    def __init__(self, float_workspace_buffer, kv_layout="NHD"):
        pass

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, pos_encoding_mode="NONE", window_left=-1,
        q_data_type="float16", kv_data_type=None, data_type=None, sm_scale=None, rope_scale=None, rope_theta=None, non_blocking=True,
    ):  # fmt: skip
        single = torch.arange(len(indptr), dtype=torch.int32)
        self.planned = (single, indptr, indices, lengths(indptr, last_page_len, page_size), sm_scale)

    def run(self, q_p, k_p, v_p, q_d, paged_kv_cache_d, custom_mask_p=None, packed_custom_mask_p=None, causal_p=False, sm_scale_p=None):
        assert causal_p and k_p.ndim == 3
        pages = torch.zeros(1, 1, dtype=torch.int32)
        ends = torch.tensor([0, len(q_p)], dtype=torch.int32), torch.tensor([len(k_p)], dtype=torch.int32)
        return dense(q_p, k_p[None], v_p[None], *ends, pages, sm_scale_p), from_page_lists(q_d, paged_kv_cache_d, *self.planned)


class BatchPod:
    def __init__(self, float_workspace_buffer, kv_layout="NHD"):
        pass

    def plan(
        self, qo_indptr_p, kv_indptr_p, kv_indices_p, last_page_len_p, qo_indptr_d, kv_indptr_d, kv_indices_d, last_page_len_d, num_qo_heads,
        num_kv_heads, head_dim, page_size, pos_encoding_mode="NONE", window_left=-1, q_data_type="float16", kv_data_type=None, sm_scale=None,
    ):  # fmt: skip
        self.p = (qo_indptr_p, kv_indptr_p, kv_indices_p, lengths(kv_indptr_p, last_page_len_p, page_size), sm_scale)
        self.d = (qo_indptr_d, kv_indptr_d, kv_indices_d, lengths(kv_indptr_d, last_page_len_d, page_size), sm_scale)

    def run(self, q_p, paged_kv_cache_p, q_d, paged_kv_cache_d, custom_mask_p=None, packed_custom_mask_p=None, causal_p=False):
        assert causal_p
        return from_page_lists(q_p, paged_kv_cache_p, *self.p), from_page_lists(q_d, paged_kv_cache_d, *self.d)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, *, cache_seqlens=None, page_table=None, cu_seqlens_q=None, max_seqlen_q=None, softmax_scale=None,
    causal=False, scheduler_metadata=None, num_splits=0, pack_gqa=None,
):  # fmt: skip
    assert causal and page_table.is_contiguous() and int(cu_seqlens_q[0]) == 0
    assert max_seqlen_q == int((cu_seqlens_q[1:] - cu_seqlens_q[:-1]).max()) and int(cu_seqlens_q[-1]) == len(q)
    assert (scheduler_metadata is None) == (num_splits == 0)
    return dense(q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, page_table, softmax_scale)


def get_scheduler_metadata(
    batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens, qkv_dtype=torch.bfloat16, headdim_v=None,
    cu_seqlens_q=None, cu_seqlens_k_new=None, cache_leftpad=None, page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1),
    attention_chunk=0, has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0,
):  # fmt: skip
    assert batch_size == len(cache_seqlens) and max_seqlen_k == int(cache_seqlens.max()) and num_splits > 1
    return "metadata"


def unified_attention(
    q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, causal, window_size, block_table, softcap, q_descale,
    k_descale, v_descale, seq_threshold_3D=None, num_par_softmax_segments=None, softmax_segm_output=None, softmax_segm_max=None,
    softmax_segm_expsum=None,
):  # fmt: skip
    assert causal and softmax_segm_output.shape == (seq_threshold_3D, q.shape[1], num_par_softmax_segments, 64)
    out.copy_(dense(q, k, v, cu_seqlens_q, seqused_k, block_table, softmax_scale))


def varlen_paged(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None):
    assert cu_seq_k is None and window_size == (-1, 0) and enable_gqa
    return dense(query, key, value, cu_seq_q, seqused_k, block_table, scale)


def varlen_packed(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None, enable_gqa=False):
    assert is_causal and len(key) == int(cu_seq_k[-1])
    parts = [
        dense(
            query[cu_seq_q[i] : cu_seq_q[i + 1]], key[cu_seq_k[i] : cu_seq_k[i + 1]][None], value[cu_seq_k[i] : cu_seq_k[i + 1]][None],
            torch.tensor([0, cu_seq_q[i + 1] - cu_seq_q[i]], dtype=torch.int32), (cu_seq_k[i + 1] - cu_seq_k[i])[None],
            torch.zeros(1, 1, dtype=torch.int32), scale,
        )
        for i in range(len(cu_seq_q) - 1)
    ]  # fmt: skip
    return torch.cat(parts)


@pytest.fixture
def libraries(monkeypatch):
    """The libraries' stand-ins as importable modules, on a GPU that is only claimed."""

    def install(name, **members):
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)

    install(
        "flashinfer", BatchPrefillWithPagedKVCacheWrapper=BatchPrefill, BatchAttention=BatchAttention, PODWithPagedKVCacheWrapper=Pod,
        BatchPODWithPagedKVCacheWrapper=BatchPod,
    )  # fmt: skip
    install("flash_attn_interface", flash_attn_with_kvcache=flash_attn_with_kvcache, get_scheduler_metadata=get_scheduler_metadata)
    for name in ("vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.ops"):
        install(name, __path__=[])
    install("vllm.v1.attention.ops.triton_unified_attention", unified_attention=unified_attention)
    monkeypatch.setattr(flashinfer_wrappers, "_workspace", lambda device: torch.empty(16))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: types.SimpleNamespace(multi_processor_count=132))


ALONE = {"fa3_splits": {"chunk"}, "fa3_two_calls": {"decodes", "chunk"}, "flashinfer_pod": {"decodes", "chunk", "two_chunks"}, "flashinfer_batch_pod": {"decodes", "chunk"}}
ADAPTORS = {peer.name: peer for module in (flashinfer_wrappers, flash_attn3, vllm_triton) for peer in module.PEERS}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", ADAPTORS)
def test_adaptor_describes_the_batch(name, batch, libraries):
    inputs = cases.device_inputs(testing.Case(batch, BATCHES[batch], SPEC), torch.bfloat16, "cpu")
    if batch in ALONE.get(name, ()):
        with pytest.raises(peers.Unsupported):
            ADAPTORS[name].prepare(inputs)
        return
    assert attention.Oracle(inputs).check(ADAPTORS[name].prepare(inputs)()) < 0.03


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("version", [varlen_paged, varlen_packed], ids=lambda f: f.__name__)
def test_varlen_attn_with_and_without_a_block_table(version, batch, monkeypatch):
    import torch.nn.attention.varlen as varlen

    monkeypatch.setattr(varlen, "varlen_attn", version)
    inputs = cases.device_inputs(testing.Case(batch, BATCHES[batch], SPEC), torch.bfloat16, "cpu")
    assert attention.Oracle(inputs).check(peers.all_peers()["varlen_attn"].prepare(inputs)()) < 0.03


def test_fa3_wants_hopper(libraries, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    inputs = cases.device_inputs(testing.Case("mixed", MIXED, SPEC), torch.bfloat16, "cpu")
    for name in ("fa3", "flashinfer_fa3"):
        with pytest.raises(peers.Unsupported, match="9.0"):
            ADAPTORS[name].prepare(inputs)
