"""What arrives when: fixed scenarios, Poisson arrivals, traces. A workload is data; it knows nothing of who serves it."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import NamedTuple

TRACES = Path(__file__).parent / "data"


class Arrival(NamedTuple):
    """One request to come.

    Attributes:
        at: seconds after the start; None for one that waits for `after_tokens`.
        after_tokens: it arrives once all requests together have put out this many tokens.
        prompt_len, output_len: tokens. End-of-sequence is ignored, so that every engine does the same work.
    """

    at: float | None
    after_tokens: int | None
    prompt_len: int
    output_len: int


def interruption(streams: int = 8, prompt: int = 512, long_prompts: int = 2, long_prompt: int = 1500, output: int = 64) -> list[Arrival]:
    """Streams that start together, and long prompts that arrive while they run: the stall that chunked prefills remove."""
    trigger = streams * output * 5 // 16
    first = [Arrival(0.0, None, prompt, output)] * streams
    return first + [Arrival(None, trigger, long_prompt, output)] * long_prompts


def load_lengths(name: str) -> list[tuple[float | None, int, int]]:
    """(arrived_at or None, prompt tokens, output tokens) of a trace in bench/data; see its README for sources."""
    path = TRACES / f"{name}.csv"
    if not path.exists():
        raise ValueError(f"no trace {name!r}; there are {', '.join(sorted(p.stem for p in TRACES.glob('*.csv')))}")
    with path.open() as file:
        return [
            (float(row["arrived_at"]) if "arrived_at" in row else None, int(row["num_prefill_tokens"]), int(row["num_decode_tokens"]))
            for row in csv.DictReader(file)
        ]


def poisson(trace: str, rate: float, count: int, *, seed: int = 0, limit: int | None = None, burstiness: float = 1.0) -> list[Arrival]:
    """Lengths drawn from a trace, arrivals from a gamma process of `rate` per second (burstiness 1 is Poisson).

    Args:
        limit: requests whose prompt and output together are longer are not drawn.
    """
    rng = random.Random(seed)
    pool = [(p, o) for _, p, o in load_lengths(trace) if p > 0 and o > 0 and (limit is None or p + o <= limit)]
    if not pool:
        raise ValueError(f"no request of {trace} has at most {limit} tokens")
    at, arrivals = 0.0, []
    for _ in range(count):
        prompt, output = rng.choice(pool)
        arrivals.append(Arrival(at, None, prompt, output))
        at += rng.gammavariate(burstiness, 1.0 / (rate * burstiness))
    return arrivals


def replay(trace: str, count: int, *, speed: float = 1.0, limit: int | None = None) -> list[Arrival]:
    """The first `count` requests of a trace at its own times, divided by `speed`."""
    rows = [(t, p, o) for t, p, o in load_lengths(trace) if limit is None or p + o <= limit][:count]
    if not rows or rows[0][0] is None:
        raise ValueError(f"{trace} has no arrival times: use poisson")
    start = rows[0][0]
    return [Arrival((t - start) / speed, None, p, max(o, 1)) for t, p, o in rows]


def prompts(arrivals: list[Arrival], vocab_size: int, *, seed: int = 0) -> list[list[int]]:
    """Random token ids of the right lengths, from the upper half of the vocabulary (no control tokens); no two share a prefix."""
    rng, first_id = random.Random(seed), vocab_size // 2
    return [[rng.randrange(first_id, vocab_size) for _ in range(a.prompt_len)] for a in arrivals]
