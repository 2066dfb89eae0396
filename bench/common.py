"""The one way this suite measures time, and the one statistic it reports.

Competitors run interleaved, round by round, each on the next of its input sets, after the caches have been flushed. The
statistic is the median over rounds; minimum and maximum are shown beside it as the spread.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

Call = Callable[[], object]

# Twice the largest last-level cache in sight: a competitor finds none of its inputs there.
CPU_FLUSH_BYTES = 96 << 20
# One that has taken this long gets no further round, whatever `min_rounds` says: an oracle in float64, say.
PATIENCE_SECONDS = 20.0
# Worker threads of the previous competitor's pool look for work before they park, libgomp's for up to 13 ms (4 to 8 as a rule): until
# then they would take a core from the next competitor, or save it the waking if it uses the same pool.
CPU_SETTLE_SECONDS = 0.025


class Timing(NamedTuple):
    """Microseconds per call: median, minimum and maximum over `rounds`."""

    us: float
    us_min: float
    us_max: float
    rounds: int


def statistic(samples_us: Sequence[float]) -> Timing:
    return Timing(statistics.median(samples_us), min(samples_us), max(samples_us), len(samples_us))


def measure(
    competitors: Mapping[str, Sequence[Call]],
    device: torch.device | str,
    *,
    seconds: float = 1.0,
    min_rounds: int = 5,
    max_rounds: int = 100,
) -> dict[str, Timing]:
    """Times every competitor, interleaved in one run.

    Args:
        competitors: name -> the same call on one or more input sets; round r uses set r modulo their number.
        device: where the calls run. CPU: wall clock around the call. CUDA: device events around it, queued behind a
            sleeping kernel, so that the host's launch time does not count unless the call itself waits for the device.
        seconds: time a competitor may spend in timed calls before it drops out of further rounds.
        min_rounds, max_rounds: bounds that win over `seconds`, but not over PATIENCE_SECONDS.

    Returns:
        name -> Timing.
    """
    if not all(competitors.values()):
        raise ValueError(f"every competitor needs at least one call, got {({name: len(c) for name, c in competitors.items()})}")
    device = torch.device(device)
    sampler = _CpuSampler() if device.type == "cpu" else _CudaSampler(device)
    for calls in competitors.values():
        for call in calls:  # compilation, lazy initialisation, first touch of every input set
            sampler.warm(call)
    names = list(competitors)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for r in range(max_rounds):
        running = [n for n in names if sum(samples[n]) < 1e6 * (PATIENCE_SECONDS if r < min_rounds else seconds)]
        if not running:
            break
        for name in random.Random(r).sample(running, len(running)):  # nobody always follows the same neighbour
            calls = competitors[name]
            samples[name].append(sampler.sample(calls[r % len(calls)]))
    return {name: statistic(values) for name, values in samples.items()}


class _CpuSampler:
    def __init__(self):
        self.flush = np.zeros(CPU_FLUSH_BYTES, dtype=np.uint8)

    def warm(self, call: Call) -> None:
        call()

    def settle(self) -> None:
        """Empties the caches until every pool's workers have parked; the core that will make the call stays awake."""
        end = time.perf_counter() + CPU_SETTLE_SECONDS
        while time.perf_counter() < end:
            np.add(self.flush, 1, out=self.flush)  # NumPy, not torch: it has no pool

    def sample(self, call: Call) -> float:
        self.settle()
        begin = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - begin) / 1e3


class _CudaSampler:
    MAX_SLEEP_SECONDS = 0.1
    CLOCK_HERTZ = 2e9  # no GPU clocks higher: a sleep may turn out longer than wanted, never shorter

    def __init__(self, device: torch.device):
        properties = torch.cuda.get_device_properties(device)
        self.device = device
        self.flush = torch.empty(max(2 * properties.L2_cache_size, 64 << 20) // 4, dtype=torch.int32, device=device)
        self.host_seconds: dict[int, float] = {}

    def warm(self, call: Call) -> None:
        for _ in range(3):
            torch.cuda.synchronize(self.device)
            begin = time.perf_counter()
            call()
            self.host_seconds[id(call)] = time.perf_counter() - begin
        torch.cuda.synchronize(self.device)

    def sample(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        # The device sleeps while the host queues the call: launches do not leave gaps between the two events.
        sleep = min(1.5 * self.host_seconds[id(call)] + 50e-6, self.MAX_SLEEP_SECONDS)
        torch.cuda._sleep(int(sleep * self.CLOCK_HERTZ))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) * 1e3


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
