"""Stall-free batches: every decode goes first, prompts fill what is left of the token budget, in chunks."""

from engine.request import Batch, View


def sarathi(view: View, budget: int) -> Batch:
    """All decodes, then prompts under way, then new requests; at most `budget` tokens in all, oldest first in each class.

    With more decodes than budget the oldest decodes run: they finish first, so every request's turn comes.
    """
    batch = [(request, 1) for request in view.running if request.remaining == 1][:budget]
    left = budget - len(batch)
    for request in view.running:
        if request.remaining > 1 and (n := view.chunk(request.remaining, left)):
            batch.append((request, n))
            left -= n
    for request in view.waiting:
        if not (n := view.chunk(request.remaining, left)):
            break
        batch.append((request, n))
        left -= n
    return batch
