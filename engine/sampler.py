"""The next tokens of all requests of a step at once.

Each sampled token takes one uniform number, a hash of the request's seed and the token's position: the same seed gives
the same tokens whatever else is in the batch, after a preemption too, and there is no generator to carry along.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.request import Request

# Wide enough for nearly every top-p set; a row that needs more takes the whole vocabulary.
CANDIDATES = 1024


def sample(logits: torch.Tensor, requests: Sequence[Request], seed: int = 0) -> list[int]:
    """Chooses a token for each row.

    Args:
        logits: [num_samples, vocab_size], any float dtype.
        requests: the request of each row.
        seed: for requests whose sampling has none.

    Returns:
        One token per row: the most likely one where temperature is 0, the first of equals.
    """
    # numpy's arg max takes the first of equals, and here a small part of torch's time.
    tokens = torch.from_numpy(logits.float().cpu().numpy().argmax(-1))
    rows = [i for i, request in enumerate(requests) if request.sampling.temperature > 0]
    if rows:
        chosen = [requests[i] for i in rows]
        tokens[rows] = _draw(logits[rows].float(), chosen, uniforms(chosen, seed))
    return tokens.tolist()


def uniforms(requests: Sequence[Request], seed: int = 0) -> torch.Tensor:
    """One number in [0, 1) per request, from its seed and the position of its next token. [num_requests] float64."""
    seeds = np.array([seed if r.sampling.seed is None else r.sampling.seed for r in requests], dtype=object)
    x = np.array([int(s) % 2**64 for s in seeds], np.uint64)
    x = _mix(_mix(x) + np.array([len(r.tokens) for r in requests], np.uint64))
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's output function: every bit of the result depends on every bit of x."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _draw(logits: torch.Tensor, requests: Sequence[Request], u: torch.Tensor) -> torch.Tensor:
    """Tokens by inverting the cumulative distribution at `u`. [n] int64."""
    sampling = [r.sampling for r in requests]
    logits = logits / torch.tensor([s.temperature for s in sampling]).unsqueeze(1)
    vocab = logits.shape[1]
    filtered = [i for i, s in enumerate(sampling) if 0 < s.top_k < vocab or s.top_p < 1]
    tokens = torch.empty(len(sampling), dtype=torch.int64)
    free = sorted(set(range(len(sampling))) - set(filtered))
    if free:
        tokens[free] = _invert(torch.softmax(logits[free], dim=-1), u[free])
    if filtered:
        top_k = torch.tensor([sampling[i].top_k or vocab for i in filtered])
        top_p = torch.tensor([sampling[i].top_p for i in filtered])
        tokens[filtered] = _draw_filtered(logits[filtered], top_k, top_p, u[filtered])
    return tokens


def _draw_filtered(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    vocab = logits.shape[1]
    total = torch.logsumexp(logits, dim=-1, keepdim=True)
    for width in (min(vocab, CANDIDATES), vocab):
        top, ids = torch.topk(logits, width, dim=-1)
        # top-p is measured on what top-k leaves: renormalise over the k kept, where that is fewer than all.
        inside = torch.arange(width) < top_k.unsqueeze(1)
        kept = torch.where(inside, top, -torch.inf)
        p = torch.exp(kept - torch.where(top_k.unsqueeze(1) < vocab, torch.logsumexp(kept, dim=-1, keepdim=True), total))
        before = torch.cumsum(p, dim=-1) - p
        complete = (top_k <= width) | (before[:, -1] >= top_p)
        if width == vocab or bool(complete.all()):
            break
    # A token stays if what is more likely does not reach top_p yet; the most likely one always does.
    p = torch.where((before < top_p.unsqueeze(1)) | (torch.arange(width) == 0), p, 0.0)
    return ids.gather(1, _invert(p, u).unsqueeze(1)).squeeze(1)


def _invert(p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """First index whose cumulative probability exceeds u times the whole. p: [n, width], need not sum to 1."""
    cumulative = torch.cumsum(p.double(), dim=-1)
    target = (u * cumulative[:, -1]).unsqueeze(1)
    index = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    # Rounding may put the target at the whole: then the last index with any probability.
    last = p.shape[1] - 1 - torch.argmax((p > 0).flip(1).to(torch.uint8), dim=1)
    return torch.minimum(index, last)
