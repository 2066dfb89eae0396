"""AMD's zentorch: its own SDPA, per request on gathered pages."""

from __future__ import annotations

import torch

from bench.peers import Call, Peer, Unsupported, bounds, gather, page_lists, plain
from bench.peers.sdpa import _masking
from sarathi_kernels.testing import Inputs


def prepare(inputs: Inputs) -> Call:
    plain(inputs)
    import zentorch  # noqa: F401  (registers torch.ops.zentorch)

    if not hasattr(torch.ops.zentorch, "zentorch_sdpa"):
        raise Unsupported("this zentorch has no zentorch_sdpa")
    work = [
        (begin, end, kv_len, pages, _masking(end - begin, kv_len, inputs.q.device, boolean=True))
        for (begin, end, kv_len), pages in zip(bounds(inputs), page_lists(inputs))
        if end > begin
    ]
    for *_, masking in work:
        if "attn_mask" in masking:
            blocked = masking["attn_mask"].logical_not()
            masking["attn_mask"] = torch.zeros(blocked.shape, dtype=inputs.q.dtype).masked_fill_(blocked, -torch.inf)[None, None]
    out = torch.empty_like(inputs.q)

    def call():
        for begin, end, kv_len, pages, masking in work:
            k, v = (gather(cache, pages, kv_len).transpose(0, 1).unsqueeze(0) for cache in (inputs.k_cache, inputs.v_cache))
            q = inputs.q[begin:end].transpose(0, 1).unsqueeze(0)
            o, _ = torch.ops.zentorch.zentorch_sdpa(q, k, v, scale=inputs.spec.softmax_scale, **masking)
            out[begin:end] = o[0].transpose(0, 1)
        return out

    return call


PEERS = [Peer("zentorch", "zentorch_sdpa, one call per request, gather included", ("cpu",), "zentorch", prepare)]
