"""The op: attention of a hybrid batch over a paged KV cache, prefill chunks and decodes in one call.

For query token t (0-based within its request) of a request with q_len query tokens and kv_len keys, at position
p = kv_len - q_len + t, and for each query head h reading kv head h // group:

    s_j  = softmax_scale * (q_h . k_j)              then softcap * tanh(s_j / softcap) if softcap > 0
    seen = { j < kv_len : (not causal or j <= p) and (window_left < 0 or j >= p - window_left) and tree_mask allows j }
    lse  = log( sum_{j in seen} exp(s_j) [+ exp(sink_h)] )            natural logarithm
    out  = sum_{j in seen} exp(s_j - lse) v_j

A row that sees no key has out = 0 and lse = -inf (or sink_h, with sinks).
"""

from __future__ import annotations

import torch

from sarathi_kernels import backends
from sarathi_kernels.backends import AttentionCall
from sarathi_kernels.plan import AttentionPlan

LIBRARY = torch.library.Library("sarathi", "DEF")
LIBRARY.define(
    "attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor(a!) out, Tensor(b!)? lse, "
    "Tensor cu_seqlens_q, Tensor seqused_k, Tensor block_table, Tensor work_items, Tensor merge_items, Tensor counts, "
    "Tensor(c!) partial_out, Tensor(d!) partial_lse, Tensor(e!) counters, "
    "Tensor? sinks, Tensor? tree_mask, Tensor? k_scale, Tensor? v_scale, "
    "float softmax_scale, float softcap, bool causal, int window_left, str backend) -> ()"
)


def _run(*args) -> None:
    backends.get(args[-1]).attention(AttentionCall(*args[:-1]))


LIBRARY.impl("attention", _run, "CompositeExplicitAutograd")
torch.library.register_fake("sarathi::attention", lambda *args: None, lib=LIBRARY)


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: AttentionPlan,
    *,
    sinks: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of every request in the plan, in one launch. Equation and conventions: the module's docstring.

    Args:
        q: [total_q, num_q_heads, head_dim], the plan's dtype; any strides.
        k_cache: [num_pages, page_size, num_kv_heads, head_dim], the spec's kv_dtype, innermost stride 1, holding this
            step's keys already (`append_kv`). Slots beyond a request's last key may hold anything, NaN included.
        v_cache: like `k_cache`.
        plan: from `plan`, on the same device.
        sinks: [num_q_heads] float32, required if and only if the spec has sinks.
        tree_mask: [total_q] int64, for speculative tokens: bit j of a token's mask says whether it may see the j-th query
            token of its own request (beside causal and window). -1 allows all, and is the only mask for requests of
            more than 64 query tokens.
        k_scale, v_scale: float32 scales of a quantized cache, shape `spec.kv_scale_shape(num_pages)`.
        out: written in place if given, like `q` in shape and dtype.
        return_lse: also return the log-sum-exp, [total_q, num_q_heads] float32.

    Returns:
        out, or (out, lse).

    Raises:
        ValueError: a shape, dtype or device does not fit the plan, or the plan uses a page that the cache has not.
    """
    spec = plan.spec
    if q.shape != (plan.total_q, spec.num_q_heads, spec.head_dim) or q.dtype != spec.dtype:
        want = (plan.total_q, spec.num_q_heads, spec.head_dim)
        raise ValueError(f"q must be {spec.dtype} of shape {want} (total_q, num_q_heads, head_dim), got {q.dtype} {tuple(q.shape)}")
    check_cache(spec, k_cache, v_cache, k_scale, v_scale)
    if plan.max_page >= k_cache.shape[0]:
        raise ValueError(f"the plan uses page {plan.max_page}, but k_cache has {k_cache.shape[0]} pages")
    if (sinks is not None) != spec.sinks:
        raise ValueError(f"spec.sinks is {spec.sinks}, but sinks were {'given' if sinks is not None else 'not given'}")
    if sinks is not None and (sinks.shape != (spec.num_q_heads,) or sinks.dtype != torch.float32):
        raise ValueError(f"sinks must be float32 of shape ({spec.num_q_heads},), got {sinks.dtype} {tuple(sinks.shape)}")
    if tree_mask is not None and (tree_mask.shape != (plan.total_q,) or tree_mask.dtype != torch.int64):
        raise ValueError(f"tree_mask must be int64 of shape ({plan.total_q},), got {tree_mask.dtype} {tuple(tree_mask.shape)}")
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    elif out.shape != q.shape or out.dtype != q.dtype or out.stride(-1) != 1:
        raise ValueError(
            f"out must be {q.dtype} of shape {tuple(q.shape)} with innermost stride 1, "
            f"got {out.dtype} {tuple(out.shape)} with strides {out.stride()}"
        )
    for name, tensor in (("q", q), ("k_cache", k_cache), ("sinks", sinks), ("tree_mask", tree_mask), ("out", out)):
        if tensor is not None and tensor.device != plan.device:
            raise ValueError(f"{name} is on {tensor.device}, the plan on {plan.device}")
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if return_lse else None
    if q.stride(-1) != 1:
        q = q.contiguous()
    torch.ops.sarathi.attention(
        q, k_cache, v_cache, out, lse,
        plan.cu_seqlens_q, plan.seqused_k, plan.block_table, plan.work_items, plan.merge_items, plan.counts,
        plan.partial_out, plan.partial_lse, plan.counters,
        sinks, tree_mask, k_scale, v_scale,
        spec.softmax_scale, spec.softcap, spec.causal, spec.window_left, plan.backend,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def check_cache(spec, k_cache, v_cache, k_scale, v_scale) -> None:
    """Raises ValueError unless the caches and their scales are what the spec asks for."""
    want = spec.kv_cache_shape(k_cache.shape[0]) if k_cache.ndim else ()
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.shape != want or cache.dtype != spec.kv_dtype or cache.stride(-1) != 1 or cache.device != k_cache.device:
            raise ValueError(
                f"{name} must be {spec.kv_dtype} of shape {want} (num_pages, page_size, num_kv_heads, head_dim) on "
                f"{k_cache.device} with innermost stride 1, got {cache.dtype} {tuple(cache.shape)} on {cache.device} "
                f"with strides {cache.stride()}"
            )
    shape = spec.kv_scale_shape(k_cache.shape[0])
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if shape is None:
            if scale is not None:
                raise ValueError(f"{name} was given, but a {spec.kv_dtype} cache has no scales")
        elif scale is None or scale.shape != shape or scale.dtype != torch.float32 or scale.device != k_cache.device or not scale.is_contiguous():
            got = "none" if scale is None else f"{scale.dtype} {tuple(scale.shape)} on {scale.device}"
            raise ValueError(f"{name} must be contiguous float32 of shape {shape} on {k_cache.device} for a {spec.kv_dtype} cache, got {got}")
