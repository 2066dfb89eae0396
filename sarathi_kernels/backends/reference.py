"""The oracle: attention in float64, twice.

`dense_attention` knows nothing of plans: one request at a time, all keys gathered, a masked softmax. `run_plan` interprets
the work items and merge items exactly as a kernel would. A wrong result is therefore either a wrong plan (the two differ)
or a wrong kernel (it differs from `run_plan`), never both at once.
"""

from __future__ import annotations

import torch

from sarathi_kernels.backends import AppendKvCall, AttentionCall, PlanConfig, Problem
from sarathi_kernels.spec import AttentionSpec


def supports(problem: Problem) -> str | None:
    return None


def plan_config(spec: AttentionSpec) -> PlanConfig:
    return PlanConfig(decode_rows=16, prefill_rows=128, decode_split=1024, prefill_split=4096)


def gather_kv(cache, scale, pages, kv_begin, kv_end):
    """Keys (or values) [kv_begin, kv_end) of one request in float64, [kv_end - kv_begin, num_kv_heads, head_dim].

    Reads no other slot, so that whatever lies in unused ones (NaN, in tests) cannot reach the result.
    """
    position = torch.arange(kv_begin, kv_end, device=cache.device)
    page, slot = pages[position // cache.shape[1]].to(torch.int64), position % cache.shape[1]
    rows = cache[page, slot].to(torch.float64)
    if scale is None:
        return rows
    per_head = scale if scale.ndim == 1 else scale[page, slot]
    return rows * per_head.to(torch.float64).unsqueeze(-1)


def visible(position, token, keys, *, q_len, kv_len, causal, window_left, tree_mask):
    """Which keys each query row may see, [rows, keys] bool.

    Args:
        position: [rows] position of each row's token in its sequence; may be negative.
        token: [rows] index of each row's token among the request's query tokens.
        keys: [keys] positions of the keys.
        tree_mask: [q_len] int64 or None, of this request.
    """
    seen = torch.ones(len(position), len(keys), dtype=torch.bool, device=keys.device)
    if causal:
        seen &= keys[None, :] <= position[:, None]
    if window_left >= 0:
        seen &= keys[None, :] >= position[:, None] - window_left
    if tree_mask is not None:
        new = keys - (kv_len - q_len)  # the key's index among the request's own query tokens
        bit = (tree_mask[token][:, None] >> new.clamp(0, 63)[None, :]) & 1
        seen &= (bit == 1) | (new < 0)[None, :] | (new > 63)[None, :]
    return seen


def softmax_rows(scores, seen, values, sink=None):
    """One softmax over the visible keys. scores, seen [heads, rows, keys], values [heads, keys, dim], sink [heads, rows]."""
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -torch.inf)
    if sink is not None:
        lse = torch.logaddexp(lse, sink)
    # exp(-inf - -inf) is NaN: a row that sees nothing has no weights.
    weights = torch.where(seen, torch.exp(scores - lse.unsqueeze(-1)), 0.0)
    return weights @ values, lse


def dense_attention(
    spec: AttentionSpec, q, k_cache, v_cache, cu_seqlens_q, seqused_k, block_table,
    *, sinks=None, tree_mask=None, k_scale=None, v_scale=None,
):  # fmt: skip
    """Attention of a hybrid batch in float64, one request at a time, with no plan. Arguments as in `attention`.

    Returns:
        out [total_q, num_q_heads, head_dim] and lse [total_q, num_q_heads], both float64.
    """
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64, device=q.device)
    bounds = cu_seqlens_q.tolist()
    for i, kv_len in enumerate(seqused_k.tolist()):
        begin, end = bounds[i], bounds[i + 1]
        if begin == end:
            continue
        keys = gather_kv(k_cache, k_scale, block_table[i], 0, kv_len).transpose(0, 1).repeat_interleave(spec.group, 0)
        values = gather_kv(v_cache, v_scale, block_table[i], 0, kv_len).transpose(0, 1).repeat_interleave(spec.group, 0)
        token = torch.arange(end - begin, device=q.device)
        scores = spec.softmax_scale * (q[begin:end].to(torch.float64).transpose(0, 1) @ keys.transpose(1, 2))
        if spec.softcap > 0:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        seen = visible(
            kv_len - (end - begin) + token, token, torch.arange(kv_len, device=q.device), q_len=end - begin, kv_len=kv_len,
            causal=spec.causal, window_left=spec.window_left, tree_mask=None if tree_mask is None else tree_mask[begin:end],
        )  # fmt: skip
        sink = None if sinks is None else sinks.to(torch.float64)[:, None].expand(-1, end - begin)
        o, l = softmax_rows(scores, seen.expand(spec.num_q_heads, -1, -1), values, sink)
        out[begin:end], lse[begin:end] = o.transpose(0, 1), l.transpose(0, 1)
    return out, lse


def attention(call: AttentionCall) -> None:
    """The backend's op: interprets the plan."""
    run_plan(call)


def run_plan(call: AttentionCall) -> None:
    """Executes every work item, then every merge item, in float64 (partials are rounded to float32, as everywhere)."""
    num_items, _, num_merges, _ = call.counts.tolist()
    for item in call.work_items[:num_items].tolist():
        _run_item(call, *item)
    for item in call.merge_items[:num_merges].tolist():
        _run_merge(call, *item)


def _run_item(
    call, request, row_begin, row_count, kv_begin, kv_end, q_begin, q_len, kv_len, tile_class, partial_row, merge_index, split_index
):
    heads = call.k_cache.shape[2]
    group = call.q.shape[1] // heads
    token, head = _unpack(row_begin, row_count, group, call.q.device)
    # [num_kv_heads, rows, head_dim]: each packed row holds one query head of the group of each kv head.
    q = call.q.unflatten(1, (heads, group))[q_begin + token, :, head].transpose(0, 1).to(torch.float64)
    keys = gather_kv(call.k_cache, call.k_scale, call.block_table[request], kv_begin, kv_end).transpose(0, 1)
    values = gather_kv(call.v_cache, call.v_scale, call.block_table[request], kv_begin, kv_end).transpose(0, 1)
    scores = call.softmax_scale * (q @ keys.transpose(1, 2))
    if call.softcap > 0:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    seen = visible(
        kv_len - q_len + token, token, torch.arange(kv_begin, kv_end, device=q.device), q_len=q_len, kv_len=kv_len,
        causal=call.causal, window_left=call.window_left,
        tree_mask=None if call.tree_mask is None else call.tree_mask[q_begin : q_begin + q_len],
    )  # fmt: skip
    split = partial_row >= 0
    sink = None if split else _sink_rows(call, heads, group, head)
    out, lse = softmax_rows(scores, seen.expand(heads, -1, -1), values, sink)
    if split:
        call.partial_out[partial_row : partial_row + row_count] = out.transpose(0, 1).to(torch.float32)
        call.partial_lse[partial_row : partial_row + row_count] = lse.transpose(0, 1).to(torch.float32)
    else:
        _write(call, q_begin + token, head, heads, group, out, lse)


def _run_merge(call, request, row_begin, row_count, q_begin, q_len, kv_len, partial_row, num_splits):
    heads = call.k_cache.shape[2]
    group = call.q.shape[1] // heads
    token, head = _unpack(row_begin, row_count, group, call.q.device)
    rows = slice(partial_row, partial_row + num_splits * row_count)
    outs = call.partial_out[rows].unflatten(0, (num_splits, row_count)).to(torch.float64).transpose(1, 2)
    lses = call.partial_lse[rows].unflatten(0, (num_splits, row_count)).to(torch.float64).transpose(1, 2)
    out, lse = combine(outs, lses, _sink_rows(call, heads, group, head))
    _write(call, q_begin + token, head, heads, group, out, lse)


def combine(outs, lses, sink=None):
    """Merges states over their first axis: outs [states, ..., dim], lses [states, ...]; `sink` joins the denominator."""
    lse = torch.logsumexp(lses, dim=0)
    if sink is not None:
        lse = torch.logaddexp(lse, sink)
    weights = torch.exp(lses - lse).unsqueeze(-1)
    return torch.where(torch.isneginf(lses).unsqueeze(-1), 0.0, weights * outs).sum(0), lse


def _unpack(row_begin, row_count, group, device):
    row = torch.arange(row_begin, row_begin + row_count, device=device)
    return row // group, row % group


def _sink_rows(call, heads, group, head):
    return None if call.sinks is None else call.sinks.to(torch.float64).view(heads, group)[:, head]


def _write(call, q_row, head, heads, group, out, lse):
    q_head = torch.arange(heads, device=head.device)[:, None] * group + head  # [heads, rows]
    call.out[q_row.expand(heads, -1), q_head] = out.to(call.out.dtype)
    if call.lse is not None:
        call.lse[q_row.expand(heads, -1), q_head] = lse.to(torch.float32)


def append_kv(call: AppendKvCall) -> None:
    keys, values = call.k.to(torch.float64), call.v.to(torch.float64)
    if call.cos_sin is not None:
        keys = rotate(keys, call.cos_sin, call.positions)
        if call.q is not None:
            call.q.copy_(rotate(call.q.to(torch.float64), call.cos_sin, call.positions).to(call.q.dtype))
    kept = call.slot_mapping >= 0
    page_size = call.k_cache.shape[1]
    page, slot = call.slot_mapping[kept] // page_size, call.slot_mapping[kept] % page_size
    for rows, cache, scale in ((keys[kept], call.k_cache, call.k_scale), (values[kept], call.v_cache, call.v_scale)):
        if cache.dtype == torch.int8:
            # One scale per token and head; an all-zero row is stored with scale 0.
            step = rows.abs().amax(-1) / 127
            scale[page, slot] = step.to(torch.float32)
            rows = torch.where(step.unsqueeze(-1) > 0, rows / step.unsqueeze(-1), 0.0).round()
        elif cache.dtype == torch.float8_e4m3fn:
            limit = torch.finfo(cache.dtype).max
            rows = (rows / scale.to(torch.float64)[:, None]).clamp(-limit, limit).to(torch.float32)
        cache[page, slot] = rows.to(cache.dtype)


def rotate(x, cos_sin, positions):
    """Rotary embedding of [tokens, heads, dim]: elements i and i + rotary_dim / 2 are a pair."""
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin[positions.to(torch.int64)].to(x.dtype).unsqueeze(1).split(half, dim=-1)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def merge_states(outs, lses, out, lse) -> None:
    merged, total = combine(outs.to(torch.float64), lses.to(torch.float64))
    out.copy_(merged.to(out.dtype))
    lse.copy_(total.to(torch.float32))
