"""FlexAttention, compiled, over the physical pages: a BlockMask names each request's pages, no gather."""

from __future__ import annotations

import functools

import torch

from bench.peers import Call, Peer, Unsupported, bounds, page_lists, plain
from sarathi_kernels.testing import Inputs

Q_BLOCK = 128


@functools.cache
def _compiled():
    from torch.nn.attention.flex_attention import flex_attention

    # One compilation per shape: dynamic shapes lose the block-sparse schedule.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 256)
    return torch.compile(flex_attention, dynamic=False)


def _block_mask(inputs: Inputs, requests: list[int]):
    """BlockMask for requests of one query length, over the cache flattened to [num_pages * page_size] keys."""
    from torch.nn.attention.flex_attention import BlockMask

    page = inputs.spec.page_size
    device, num_pages = inputs.q.device, inputs.k_cache.shape[0]
    spans, lists = bounds(inputs), page_lists(inputs)
    q_len = spans[requests[0]][1] - spans[requests[0]][0]
    q_blocks = -(-q_len // Q_BLOCK)
    batch = len(requests)
    # Physical page -> position of its first key in the request; a page of someone else lies beyond every query.
    first = torch.full((batch, num_pages), 2**30, dtype=torch.int32)
    shift = torch.zeros(batch, dtype=torch.int32)
    full_count, part_count = (torch.zeros(batch, 1, q_blocks, dtype=torch.int32) for _ in range(2))
    full, part = (torch.zeros(batch, 1, q_blocks, num_pages, dtype=torch.int32) for _ in range(2))
    for b, i in enumerate(requests):
        pages, kv_len = lists[i].cpu().to(torch.int32), spans[i][2]
        shift[b] = kv_len - q_len
        first[b, pages.long()] = torch.arange(len(pages), dtype=torch.int32) * page
        for block in range(q_blocks):
            low = kv_len - q_len + block * Q_BLOCK  # position of the block's first row, and of its last one
            high = min(low + Q_BLOCK, kv_len) - 1
            whole, reach = min((low + 1) // page, len(pages)), min(high // page + 1, len(pages))
            full_count[b, 0, block], part_count[b, 0, block] = whole, reach - whole
            full[b, 0, block, :whole] = pages[:whole]
            part[b, 0, block, : reach - whole] = pages[whole:reach]
    first, shift = first.to(device), shift.to(device)

    def mask_mod(b, h, q, kv):
        return first[b, kv // page] + kv % page <= shift[b] + q

    return BlockMask.from_kv_blocks(
        part_count.to(device), part.to(device), full_count.to(device), full.to(device),
        BLOCK_SIZE=(Q_BLOCK, page), mask_mod=mask_mod, seq_lengths=(q_len, num_pages * page), compute_q_blocks=False,
    )  # fmt: skip


def prepare(inputs: Inputs) -> Call:
    plain(inputs)
    if inputs.spec.head_dim & (inputs.spec.head_dim - 1):
        raise Unsupported(f"FlexAttention wants a head_dim that is a power of two, got {inputs.spec.head_dim}")
    flex = _compiled()
    spans = bounds(inputs)
    by_length: dict[int, list[int]] = {}
    for i, (begin, end, _) in enumerate(spans):
        if end > begin:
            by_length.setdefault(end - begin, []).append(i)
    keys, values = (cache.flatten(0, 1).transpose(0, 1).unsqueeze(0) for cache in (inputs.k_cache, inputs.v_cache))
    work = []
    for q_len, requests in by_length.items():
        rows = torch.cat([torch.arange(spans[i][0], spans[i][1]) for i in requests]).to(inputs.q.device)
        work.append((q_len, len(requests), rows, _block_mask(inputs, requests)))
    out = torch.empty_like(inputs.q)

    def call():
        for q_len, batch, rows, block_mask in work:
            q = inputs.q[rows].unflatten(0, (batch, q_len)).transpose(1, 2)
            k, v = (t.expand(batch, -1, -1, -1) for t in (keys, values))
            o = flex(q, k, v, block_mask=block_mask, enable_gqa=True, scale=inputs.spec.softmax_scale)
            out[rows] = o.transpose(1, 2).flatten(0, 1)
        return out

    return call


PEERS = [
    Peer(
        "flex", "FlexAttention compiled per shape, paged BlockMask, one call per query length",
        ("cpu", "cuda"), "torch.nn.attention.flex_attention", prepare,
    )
]  # fmt: skip
