"""What a user feels, from the times of tokens: time to first token, time between tokens, stalls."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass
class Trace:
    """One request's arrival and the times of its tokens, seconds on one clock."""

    request_id: str
    arrival: float
    times: list[float] = dataclasses.field(default_factory=list)


def summarize(traces: Sequence[Trace]) -> dict[str, float]:
    """The figures of one run; every request must have at least one token.

    Returns:
        ttft_p50_s: median time from arrival to first token.
        tbt_p50_s, tbt_p99_s, tbt_max_s: time between consecutive tokens of a request, over all requests' pairs.
        longest_stall_s: longest time without a token for anybody while some answer was under way.
        output_tok_s: tokens of all requests per second from the first arrival to the last token.
    """
    gaps = np.concatenate([np.diff(t.times) for t in traces])
    ttft = np.array([t.times[0] - t.arrival for t in traces])
    begin, end = min(t.arrival for t in traces), max(t.times[-1] for t in traces)
    return {
        "ttft_p50_s": float(np.percentile(ttft, 50)),
        "tbt_p50_s": float(np.percentile(gaps, 50)) if len(gaps) else 0.0,
        "tbt_p99_s": float(np.percentile(gaps, 99)) if len(gaps) else 0.0,
        "tbt_max_s": float(gaps.max(initial=0.0)),
        "longest_stall_s": longest_stall(traces)[0],
        "output_tok_s": sum(len(t.times) for t in traces) / (end - begin) if end > begin else 0.0,
    }


def longest_stall(traces: Sequence[Trace]) -> tuple[float, float]:
    """(length, begin) of the longest stretch without any token between some request's first and last token."""
    times = np.unique(np.concatenate([t.times for t in traces]))
    busy = [
        (after - before, before)
        for before, after in zip(times[:-1], times[1:], strict=True)
        if any(t.times[0] <= before and after <= t.times[-1] for t in traces)
    ]
    length, begin = max(busy, default=(0.0, 0.0))
    return float(length), float(begin)
