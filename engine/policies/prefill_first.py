"""Prompts before decodes, never both in one batch: the order of vLLM's first scheduler. The baseline that stalls."""

from engine.request import Batch, View


def prefill_first(view: View, budget: int) -> Batch:
    """Whole prompts while the next one fits the budget; only when there is none, every decode.

    A prompt longer than the whole budget, which that scheduler would refuse, is taken in pieces of the budget, so that
    any budget serves any prompt.
    """
    batch, left = [], budget
    for request in [*(r for r in view.running if r.remaining > 1), *view.waiting]:
        if request.remaining > left and batch:
            break
        n = min(request.remaining, left)
        batch.append((request, n))
        left -= n
    return batch or [(request, 1) for request in view.running][:budget]
