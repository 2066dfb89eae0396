"""What a batch must cost at least, and what this machine can do at most.

For request i with c query tokens, L keys (this step's included), bottom-right causal:

    pairs_i = sum_j min(L - c + j + 1, window_left + 1)     FLOP_i = 4 Hq D pairs_i
    bytes_i = reach_i Hk 2 D b_kv + c Hq D (b_q + b_out)    reach_i = keys that any row of the request sees
    floor   = max(sum FLOP / matmul rate, sum bytes / read bandwidth)

The two ceilings are measured, never taken from a data sheet: the fastest round of each, since a ceiling is a most.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from bench.common import Call, Timing, dtype_name, measure
from sarathi_kernels.memory import empty_huge
from sarathi_kernels.spec import AttentionSpec

READ_BYTES = {"cpu": 512 << 20, "cuda": 4 << 30}
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}


class Work(NamedTuple):
    flops: float
    bytes: float

    def floor_us(self, ceilings: Ceilings, dtype: torch.dtype) -> float:
        """The roofline floor in microseconds."""
        return 1e6 * max(self.flops / (ceilings.tflops(dtype) * 1e12), self.bytes / (ceilings.read_gbps * 1e9))


class Ceilings(NamedTuple):
    """Measured on the machine: TFLOP/s of a large matrix product per dtype name, GB/s of reading with every thread."""

    matmul_tflops: dict[str, float]
    read_gbps: float

    def tflops(self, dtype: torch.dtype) -> float:
        name = dtype_name(dtype)
        if name not in self.matmul_tflops:
            raise KeyError(f"no matmul ceiling was measured for {name}, only for {', '.join(self.matmul_tflops)}")
        return self.matmul_tflops[name]

    def joined(self, other: Ceilings) -> Ceilings:
        """The best of both, for a machine record."""
        rates = {name: max(self.matmul_tflops.get(name, 0.0), rate) for name, rate in other.matmul_tflops.items()}
        return Ceilings(self.matmul_tflops | rates, max(self.read_gbps, other.read_gbps))


def attention_work(spec: AttentionSpec, requests) -> Work:
    """FLOP and unavoidable bytes of one layer's attention for `requests`, pairs (q_len, kv_len)."""
    flops = num_bytes = 0.0
    kv_bytes = 2 * spec.head_dim * spec.kv_dtype.itemsize + (8 if spec.kv_dtype == torch.int8 else 0)
    for q_len, kv_len in requests:
        position = torch.arange(kv_len - q_len, kv_len)
        seen = (position + 1).clamp(min=0) if spec.causal else torch.full_like(position, kv_len)
        if spec.window_left >= 0:
            first = (position - spec.window_left).clamp(min=0)
            seen = ((position + 1 if spec.causal else torch.full_like(position, kv_len)) - first).clamp(min=0)
        reach = min(kv_len, q_len + spec.window_left) if spec.window_left >= 0 else kv_len
        flops += 4.0 * spec.num_q_heads * spec.head_dim * int(seen.sum())
        num_bytes += reach * spec.num_kv_heads * kv_bytes + 2 * q_len * spec.num_q_heads * spec.head_dim * spec.dtype.itemsize
    return Work(flops, num_bytes)


def append_kv_work(spec: AttentionSpec, num_tokens: int, *, rotary: bool) -> Work:
    """Bytes of appending `num_tokens`: k and v read and written once, and with `rotary` q read and written."""
    row = 2 * spec.num_kv_heads * spec.head_dim * (spec.dtype.itemsize + spec.kv_dtype.itemsize)
    if rotary:
        row += 2 * spec.num_q_heads * spec.head_dim * spec.dtype.itemsize
    return Work(0.0, float(num_tokens * row))


@functools.cache
def probes(device: torch.device, dtype: torch.dtype) -> dict[str, Sequence[Call]]:
    """Competitors that do nothing but multiply, or nothing but read, for a run to take its ceilings from.

    A machine in a cloud may change its memory bandwidth by half within minutes: what a case is held against must come from
    the same interleaved rounds as its times.
    """
    n = MATMUL_SIZE[device.type] // (4 if dtype == torch.float64 else 1)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out, buffer = torch.empty(n, n, dtype=dtype, device=device), _read_buffer(device)
    return {
        "ceiling matmul": [lambda: torch.mm(a, b, out=out)],
        "ceiling sum": [lambda: buffer.sum()],
        "ceiling max": [lambda: buffer.max()],
    }


@functools.cache
def _read_buffer(device: torch.device) -> torch.Tensor:
    shape = (READ_BYTES[device.type] // 4,)
    buffer = empty_huge(shape, torch.float32) if device.type == "cpu" else torch.empty(shape, dtype=torch.float32, device=device)
    return buffer.fill_(1)


def ceilings_from(timings: Mapping[str, Timing], device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The ceilings that a run's probes saw: the fastest round of each, and the faster of the two readers."""
    n = MATMUL_SIZE[device.type] // (4 if dtype == torch.float64 else 1)
    read = min(timings[name].us_min for name in ("ceiling sum", "ceiling max"))
    return Ceilings({dtype_name(dtype): 2 * n**3 / timings["ceiling matmul"].us_min / 1e6}, READ_BYTES[device.type] / read / 1e3)


def measure_ceilings(device: torch.device | str, dtypes, *, seconds: float = 0.5) -> Ceilings:
    """The ceilings alone, each dtype's matmul rate and the best read bandwidth seen."""
    device = torch.device(device)
    found = Ceilings({}, 0.0)
    for dtype in dict.fromkeys(dtypes):
        found = found.joined(ceilings_from(measure(probes(device, dtype), device, seconds=seconds), device, dtype))
    return found
