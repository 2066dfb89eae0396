"""`bench append_kv`: new keys and values into their pages, plain and with the rotary embedding fused in."""

from __future__ import annotations

import torch

import sarathi_kernels as sk
from bench import cases as case_data
from bench.common import dtype_name, measure
from bench.machine import machine_record
from bench.roofline import Ceilings, append_kv_work, ceilings_from, probes
from bench.rows import Report, add_ratios, make_row
from sarathi_kernels import backends
from sarathi_kernels.backends import Problem
from sarathi_kernels.testing import OUT_CAP, Case

SUBJECT = "append_kv"
PEER = "torch"


class Step:
    """One step's new tokens of a case, and a cache for them."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device, seed: int):
        inputs = case_data.device_inputs(case, dtype, device, seed=seed)
        self.spec, self.k_cache, self.v_cache = inputs.spec, inputs.k_cache, inputs.v_cache
        generator = torch.Generator(device).manual_seed(seed + 1)
        shape = (inputs.q.shape[0], self.spec.num_kv_heads, self.spec.head_dim)
        self.k, self.v = (torch.randn(*shape, generator=generator, device=device).to(dtype) for _ in range(2))
        self.q = inputs.q
        plan = inputs.plan("reference")
        self.slots, self.positions = sk.slot_mapping(plan), sk.token_positions(plan)
        angle = torch.arange(int(inputs.seqused_k.max()), device=device)[:, None] * 10000.0 ** -torch.linspace(
            0, 1, self.spec.head_dim // 2, device=device
        )
        self.cos_sin = torch.cat((angle.cos(), angle.sin()), dim=1).float().contiguous()

    def ours(self, backend: str, rotary: bool):
        extra = {"q": self.q, "positions": self.positions, "cos_sin": self.cos_sin} if rotary else {}
        return lambda: sk.append_kv(self.spec, self.k, self.v, self.k_cache, self.v_cache, self.slots, backend=backend, **extra)

    def torch(self, rotary: bool):
        """The same with torch's indexing and elementwise ops."""
        flat_k, flat_v = self.k_cache.flatten(0, 1), self.v_cache.flatten(0, 1)

        def call():
            k = self.k
            if rotary:
                cos, sin = (part[:, None].to(k.dtype) for part in self.cos_sin[self.positions.long()].chunk(2, dim=1))
                k, q = _rotate(k, cos, sin), _rotate(self.q, cos, sin)
                self.q.copy_(q)
            flat_k.index_copy_(0, self.slots, k)
            flat_v.index_copy_(0, self.slots, self.v)

        return call


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def _error(step: Step, backend: str, rotary: bool) -> float:
    """Largest difference, in the stored keys, values and rotated queries, between a backend and the oracle."""
    before = [t.clone() for t in (step.k_cache, step.v_cache, step.q)]

    def result(run):
        for now, was in zip((step.k_cache, step.v_cache, step.q), before):
            now.copy_(was)
        run()
        rows = (step.k_cache.flatten(0, 1)[step.slots], step.v_cache.flatten(0, 1)[step.slots], step.q)
        return [t.double() for t in rows]

    want = result(step.ours("reference", rotary))
    got = result(step.ours(backend, rotary))
    for now, was in zip((step.k_cache, step.v_cache, step.q), before):
        now.copy_(was)
    return max(float((a - b).abs().max()) for a, b in zip(got, want))


def run(cases: list[Case], dtypes, *, names=None, device="cpu", seconds=1.0, min_rounds=5, log=print) -> Report:
    """Every case, plain and `+rope`, on our backends and torch's indexing."""
    device = torch.device(device)
    chosen = names if names is not None else [*(n for n in backends.NAMES if n != "reference"), PEER]
    absent = {name: "has no append_kv adaptor" for name in chosen if name not in (*backends.NAMES, PEER)}
    for name in [n for n in chosen if n in backends.NAMES]:  # one that cannot run on this device at all is absent, not refused
        reasons = {backends.get(name).supports(Problem(case.with_dtype(dtype), device)) for case in cases for dtype in dtypes}
        if None not in reasons:
            absent[name] = "; ".join(sorted(reasons))
    chosen = [name for name in chosen if name not in absent]
    best = Ceilings({}, 0.0)
    report = Report(machine_record(device), absent=absent)
    for case in cases:
        for dtype in dtypes:
            steps = [Step(case, dtype, device, seed) for seed in range(2)]
            for rotary in (False, True):
                name = case.name + ("+rope" if rotary else "")
                log(f"{SUBJECT} {name} {dtype_name(dtype)} ...")
                calls, errors = {}, {}
                for backend in (n for n in chosen if n in backends.NAMES):
                    why = backends.get(backend).supports(Problem(steps[0].spec, device))
                    if why is None:
                        errors[backend] = _error(steps[0], backend, rotary)
                        # Stored exactly as given, or rotated: one rounding of values of the order of a few units.
                        bound = 2 * OUT_CAP[dtype] if rotary else 0.0
                        why = f"off by {errors[backend]:.3g}, allowed {bound:.3g}" if errors[backend] > bound else None
                    if why is None:
                        calls[backend] = [step.ours(backend, rotary) for step in steps]
                    else:
                        report.refused.append({"case": name, "backend": backend, "dtype": dtype_name(dtype), "why": why})
                if PEER in chosen:
                    calls[PEER], errors[PEER] = [step.torch(rotary) for step in steps], None
                if not calls:
                    continue
                timings = measure(calls | probes(device, dtype), device, seconds=seconds, min_rounds=min_rounds)
                ceilings = ceilings_from(timings, device, dtype)
                best = best.joined(ceilings)
                work = append_kv_work(steps[0].spec, steps[0].k.shape[0], rotary=rotary)
                rows = [make_row(SUBJECT, name, n, dtype, timings[n], work, ceilings, errors[n]) for n in calls]
                add_ratios(rows, {PEER})
                report.rows += rows
    report.machine["ceilings"] = best._asdict()
    return report
