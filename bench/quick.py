"""`bench quick`, what `make bench` runs: the named cases, append_kv, plan and the engine, sized for ten minutes on this machine."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from bench import append_kv, attention, cases, plan, report
from bench.machine import machine_record
from bench.rows import Report


def main(out: Path, minutes: float = 10.0) -> int:
    """Runs each step while time is left, saves after each, then draws the report. Returns 1 if a check was red."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = [torch.bfloat16, torch.float32] if device.type == "cpu" else [torch.bfloat16]
    deadline = time.monotonic() + 60 * minutes
    common = {"device": device, "seconds": 0.5, "min_rounds": 3}
    named = [cases.PERFORMANCE_CASES[f"{batch}/{model}"] for model in ("smollm2", "llama8b") for batch in cases.NAMED]
    hybrid = cases.select("hybrid/llama8b") if device.type == "cuda" else []
    steps = [
        *((f"attention {case.name}", lambda case=case: attention.run([case], dtypes, **common)) for case in named),
        ("append_kv", lambda: append_kv.run(named[4:6], dtypes[:1], **common)),
        ("plan", lambda: plan.run(dtypes, device=device)),
        *((f"attention {case.name}", lambda case=case: attention.run([case], dtypes, **common)) for case in hybrid),
        ("engine", lambda: _engine(device)),
    ]
    if device.type == "cpu":  # the engine step last costs the least when time runs out, but it is what people ask for
        steps.insert(8, steps.pop())
    total = Report(machine_record(device))
    for name, step in steps:
        if time.monotonic() > deadline:
            print(f"{minutes:g} minutes are over: {name} and what follows was left out")
            break
        total.extend(step())
        total.save(out / "bench.json")
    total.print()
    report.write([out / "bench.json"], out)
    print(f"tables and plots: {out}")
    return 1 if any("allowed" in r["why"] for r in total.refused) else 0


def _engine(device: torch.device) -> Report:
    from bench import __main__, engine

    if device.type != "cpu":
        return Report({}, absent={"engine": "bench engine serves on the CPU here; run it by hand for a GPU"})
    return engine.run(__main__.parser().parse_args(["engine", "--repeats", "1", "--policy", "sarathi,prefill_first"]))
