"""`bench plan`: what laying out a step costs the host, against the number of requests. There is no roofline for it."""

from __future__ import annotations

import torch

import sarathi_kernels as sk
from bench.cases import MODELS, device_inputs
from bench.common import dtype_name, measure
from bench.machine import machine_record
from bench.rows import ROW_KEYS, Report
from sarathi_kernels import backends
from sarathi_kernels.backends import Problem
from sarathi_kernels.testing import Case

SUBJECT = "plan"
REQUESTS = (8, 64, 256, 1024)
# The host calls plan once per step: enough of them per sample that the clock's grain does not show.
CALLS_PER_SAMPLE = 200


def plan_case(requests: int) -> Case:
    """One chunk and `requests - 1` decodes of 512 to 1,023 keys, on the smallest of the models: only the tables matter."""
    spec = MODELS["smollm2"]
    return Case(f"{requests} requests", ((256, 1024), *((1, 512 + i % 512) for i in range(requests - 1))), spec)


def run(dtypes, *, names=None, device="cpu", seconds=0.5, min_rounds=20, log=print, **_) -> Report:
    """The full Python call with a kept workspace, warm caches (`CALLS_PER_SAMPLE` calls in a row), per backend's tile sizes."""
    device = torch.device(device)
    report = Report(machine_record(device))
    dtype = dtypes[0]
    for count in REQUESTS:
        case = plan_case(count)
        inputs = device_inputs(case, dtype, "cpu")
        calls = {}
        for name in names or [n for n in backends.NAMES if n != "reference"]:
            if name not in backends.NAMES:
                continue
            why = backends.get(name).supports(Problem(inputs.spec, device))
            if why is not None:
                report.absent[name] = why
                continue
            calls[name] = [_calls(inputs, name, device)]
        if not calls:
            continue
        log(f"{SUBJECT} {case.name} ...")
        for name, timing in measure(calls, "cpu", seconds=seconds, min_rounds=min_rounds).items():
            row = dict.fromkeys(ROW_KEYS) | {"subject": SUBJECT, "case": case.name, "backend": name, "dtype": dtype_name(dtype), "ratio": {}}
            us = {key: round(getattr(timing, key) / CALLS_PER_SAMPLE, 3) for key in ("us", "us_min", "us_max")}
            report.rows.append(row | us | {"tflops": 0.0, "gbps": 0.0, "roof_us": 0.0, "roof_fraction": 0.0})
    return report


def _calls(inputs, name, device):
    workspace = sk.Workspace()

    def calls():
        for _ in range(CALLS_PER_SAMPLE):
            sk.plan(
                inputs.spec, inputs.cu_seqlens_q, inputs.seqused_k, inputs.block_table,
                backend=name, device=device, workspace=workspace,
            )  # fmt: skip
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return calls
