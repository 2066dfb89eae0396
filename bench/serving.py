"""What a served request looks like from outside, and the metrics of many, in the field names of `vllm bench serve`."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

import numpy as np

METRICS = ("ttft", "tpot", "itl", "e2el")


@dataclasses.dataclass
class Served:
    """One request as its client saw it.

    Attributes:
        prompt_len: tokens.
        start: when it arrived, seconds on the run's clock; the wait for a step under way counts.
        token_times: when each output token came, same clock.
        error: why it has no or not all tokens, "" if it has.
    """

    prompt_len: int
    start: float
    token_times: list[float] = dataclasses.field(default_factory=list)
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.start

    @property
    def itl(self) -> list[float]:
        """Gaps between tokens: the time between tokens, TBT."""
        return [b - a for a, b in zip(self.token_times, self.token_times[1:])]

    @property
    def latency(self) -> float:
        return self.token_times[-1] - self.start

    @property
    def tpot(self) -> float:
        n = len(self.token_times)
        return (self.latency - self.ttft) / (n - 1) if n > 1 else 0.0


def parse_goodput(text: str | None) -> dict[str, float]:
    """ "ttft:2000,tpot:100" -> {"ttft": 2.0, "tpot": 0.1}; milliseconds in, seconds out. Also itl: every gap must hold."""
    slo = {}
    for part in filter(None, (text or "").split(",")):
        name, _, value = part.partition(":")
        if name not in METRICS or not value:
            raise ValueError(f"goodput wants NAME:MS with NAME one of {', '.join(METRICS)}, got {part!r}")
        slo[name] = float(value) / 1e3
    return slo


def summarize(served: Sequence[Served], *, slo: dict[str, float], detailed: bool = True) -> dict:
    """Totals, and mean / median / std / P99 in milliseconds of TTFT, TPOT, ITL and E2E latency.

    Args:
        slo: seconds per metric; a request is good if it meets all (ITL: in every gap).
        detailed: also per-request lists, which the plots of the report are drawn from.

    Raises:
        ValueError: no request completed; the first error is in the message.
    """
    done = [s for s in served if not s.error and s.token_times]
    if not done:
        raise ValueError(f"none of {len(served)} requests completed: {next((s.error for s in served if s.error), 'no token came')}")
    begin = min(s.start for s in served)
    duration = max(s.token_times[-1] for s in done) - begin
    outputs = sum(len(s.token_times) for s in done)
    inputs = sum(s.prompt_len for s in done)
    good = sum(_good(s, slo) for s in done)
    result = {
        "num_prompts": len(served),
        "duration": duration,
        "completed": len(done),
        "failed": len(served) - len(done),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / duration,
        "request_goodput": good / duration if slo else None,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
    }
    values = {
        "ttft": [s.ttft for s in done],
        "tpot": [s.tpot for s in done if len(s.token_times) > 1],
        "itl": [gap for s in done for gap in s.itl],
        "e2el": [s.latency for s in done],
    }
    for name in METRICS:
        ms = [1e3 * v for v in values[name]] or [0.0]
        result[f"mean_{name}_ms"] = statistics.fmean(ms)
        result[f"median_{name}_ms"] = statistics.median(ms)
        result[f"std_{name}_ms"] = statistics.pstdev(ms)
        result[f"p99_{name}_ms"] = float(np.percentile(ms, 99))
    result = {key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}
    if detailed:
        result |= {
            "input_lens": [s.prompt_len for s in served],
            "output_lens": [len(s.token_times) for s in served],
            "start_times": [round(s.start - begin, 5) for s in served],
            "ttfts": [round(s.ttft, 5) if s.token_times else None for s in served],
            "itls": [[round(gap, 5) for gap in s.itl] for s in served],
            "errors": [s.error for s in served],
        }
    return result


def _good(s: Served, slo: dict[str, float]) -> bool:
    worst = {"ttft": s.ttft, "tpot": s.tpot, "itl": max(s.itl, default=0.0), "e2el": s.latency}
    return all(worst[name] <= limit for name, limit in slo.items())
