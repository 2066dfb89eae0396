"""Microbenchmarks of a GPU: matmul rate per dtype, copy and read bandwidth, and the share of SMs that saturates bandwidth.

The last decides how a hybrid launch may divide the machine: if x of the SMs can read as fast as all of them, the rest
computes for free beside decodes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

from bench.common import dtype_name, measure
from bench.machine import machine_record
from bench.roofline import measure_ceilings

COPY_BYTES = 2 << 30
STREAM_BYTES = 1 << 30
BLOCK = 8192
SATURATED = 0.95


@triton.jit
def _stream(source, sink, num_blocks, BLOCK: tl.constexpr):
    """Each program reads every num_programs-th block; one program per SM as long as there are no more programs than SMs."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    offsets = tl.arange(0, BLOCK)
    # Four blocks of 32 KiB on their way: more than the bandwidth-latency product of one SM.
    for block in tl.range(tl.program_id(0), num_blocks, tl.num_programs(0), num_stages=4):
        total += tl.load(source + block.to(tl.int64) * BLOCK + offsets)
    tl.store(sink + tl.program_id(0), tl.sum(total, axis=0))


def sm_share(device: torch.device, seconds: float) -> dict:
    """GB/s read by n programs, for n up to all SMs, and the smallest n that reaches 95 % of the best."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    counts = sorted({max(1, processors * i // 16) for i in range(1, 17)})
    source = torch.ones(STREAM_BYTES // 4, dtype=torch.float32, device=device)
    sink = torch.empty(processors, dtype=torch.float32, device=device)
    num_blocks = source.numel() // BLOCK

    def run(n):
        _stream[(n,)](source, sink, num_blocks, BLOCK=BLOCK, num_warps=8)

    timings = measure({str(n): [lambda n=n: run(n)] for n in counts}, device, seconds=seconds / len(counts))
    run(processors)
    read = float(sink.sum(dtype=torch.float64))
    if read != source.numel():
        raise RuntimeError(f"the stream kernel read {read:.0f} ones, want {source.numel()}")
    gbps = {n: STREAM_BYTES / timings[str(n)].us / 1e3 for n in counts}
    best = max(gbps.values())
    enough = min(n for n in counts if gbps[n] >= SATURATED * best)
    return {"sms": processors, "gbps_by_sms": {n: round(v, 1) for n, v in gbps.items()}, "saturating_sms": enough, "share": round(enough / processors, 3)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_micro", description=__doc__.split("\n")[0])
    parser.add_argument("--json")
    parser.add_argument("--seconds", type=float, default=0.3)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA device")
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    result = {"machine": machine_record(device)}
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    ceilings = measure_ceilings(device, dtypes, seconds=args.seconds)
    result["matmul_tflops"] = {dtype_name(d): round(ceilings.tflops(d), 1) for d in dtypes}
    result["read_gbps"] = round(ceilings.read_gbps, 1)
    a, b = (torch.empty(COPY_BYTES // 4, dtype=torch.float32, device=device).fill_(1.0) for _ in range(2))
    copy = measure({"copy": [lambda: b.copy_(a)]}, device, seconds=args.seconds)["copy"]
    result["copy_gbps"] = round(2 * COPY_BYTES / copy.us / 1e3, 1)
    result["stream"] = sm_share(device, seconds=10 * args.seconds)
    result["machine_after"] = machine_record(device)["gpu"]
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    shown = {key: value for key, value in result.items() if not key.startswith("machine")}
    print(json.dumps(shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
