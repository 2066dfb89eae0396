"""vLLM's Triton unified attention: one launch over the same pages, 16-row tiles for chunks and decodes alike."""

from __future__ import annotations

import torch

from bench.peers import Call, Peer, bounds, plain
from sarathi_kernels.testing import Inputs

# As vLLM's Triton backend sizes its decode-only path: split below this many programs, into this many segments.
MIN_LAUNCH_GRID, SEGMENTS = 128, 16


def prepare(inputs: Inputs) -> Call:
    plain(inputs)
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    spec, spans = inputs.spec, bounds(inputs)
    out = torch.empty_like(inputs.q)
    threshold = max(1, MIN_LAUNCH_GRID // spec.num_kv_heads)

    def scratch(*tail):
        return torch.empty(threshold, spec.num_q_heads, SEGMENTS, *tail, dtype=torch.float32, device=out.device)

    padded = 1 << (spec.head_dim - 1).bit_length()
    options = dict(
        cu_seqlens_q=inputs.cu_seqlens_q, max_seqlen_q=max(end - begin for begin, end, _ in spans), seqused_k=inputs.seqused_k,
        max_seqlen_k=max(n for *_, n in spans), softmax_scale=spec.softmax_scale, causal=True, window_size=(-1, -1),
        block_table=inputs.block_table, softcap=0.0, q_descale=None, k_descale=None, v_descale=None,
        seq_threshold_3D=threshold, num_par_softmax_segments=SEGMENTS, softmax_segm_output=scratch(padded),
        softmax_segm_max=scratch(), softmax_segm_expsum=scratch(),
    )  # fmt: skip

    def call():
        unified_attention(inputs.q, inputs.k_cache, inputs.v_cache, out, **options)
        return out

    return call


PEERS = [Peer("vllm_triton", "vLLM Triton unified attention, one launch", ("cuda",), "vllm.v1.attention.ops.triton_unified_attention", prepare)]
