"""Who runs next: pure functions (view, budget) -> [(request, num_tokens)], one per file.

A policy decides order and sizes, nothing else: it changes no request, takes no page and knows no clock. The scheduler
has made room for every running request's next token, and `view.waiting` holds only what fits in the cache.
"""

from engine.policies.prefill_first import prefill_first
from engine.policies.sarathi import sarathi

POLICIES = {"sarathi": sarathi, "prefill_first": prefill_first}
