"""`bench attention`: the hybrid attention op on every backend and peer, checked, then timed in one interleaved run per case."""

from __future__ import annotations

from collections.abc import Callable

import torch

import sarathi_kernels as sk
from bench import cases as case_data
from bench import peers as peer_data
from bench.common import Timing, dtype_name, measure
from bench.machine import machine_record
from bench.roofline import Ceilings, attention_work, ceilings_from, probes
from bench.rows import Report, add_ratios, make_row
from sarathi_kernels import backends
from sarathi_kernels.backends import Problem
from sarathi_kernels.testing import OUT_CAP, Case, Inputs, eager_attention, max_error

CHECKED_ROWS = 24
# A set this large evicts itself; smaller ones are rotated in twos.
ROTATE_BELOW_BYTES = 128 << 20
SUBJECT = "attention"


class RedCheck(Exception):
    """A result that is not within tolerance of the oracle. There is no number for it."""


def our_call(inputs: Inputs, backend: str) -> Callable[[], torch.Tensor]:
    """One attention call of this project, on a plan made beforehand."""
    plan = inputs.plan(backend)
    out = torch.empty_like(inputs.q)
    return lambda: sk.attention(inputs.q, inputs.k_cache, inputs.v_cache, plan, out=out, **inputs.kwargs)


class Oracle:
    """float64 results of some rows, and the error that same-dtype PyTorch makes on them."""

    def __init__(self, inputs: Inputs):
        self.rows, sampled = case_data.sample_rows(inputs, CHECKED_ROWS)
        self.rows = self.rows.to(inputs.q.device)
        self.want = sampled.oracle()[0]
        self.bound = min(2 * max_error(eager_attention(sampled), self.want) + 1e-5, OUT_CAP[inputs.spec.dtype])

    def check(self, out: torch.Tensor) -> float:
        """The largest error on the rows; raises RedCheck beyond the bound."""
        got = out[self.rows]
        error = max_error(got, self.want)
        if not bool(torch.isfinite(out).all()):
            raise RedCheck("the output is not finite")
        if not error <= self.bound:
            raise RedCheck(f"off by {error:.3g} on {len(self.rows)} rows, allowed {self.bound:.3g}")
        return error


def competitors(names: list[str] | None, device: torch.device) -> tuple[list[str], dict[str, peer_data.Peer], dict[str, str]]:
    """(our backends, peers, absent) for a list of names, or for everything that this machine has (the oracle only if named)."""
    known = peer_data.all_peers()
    absent: dict[str, str] = {}
    chosen = names if names is not None else [n for n in backends.NAMES if n != "reference"] + [n for n in known if n != "flex"]
    ours, theirs = [], {}
    for name in chosen:
        if name in backends.NAMES:
            ours.append(name)
        elif name not in known:
            raise ValueError(f"unknown backend {name!r}; ours: {', '.join(backends.NAMES)}; peers: {', '.join(known)}")
        elif (why := known[name].absent(device)) is not None:
            absent[name] = why
        else:
            theirs[name] = known[name]
    return ours, theirs, absent


def prepare(name: str, inputs: Inputs, peer: peer_data.Peer | None):
    """A competitor's call on one input set; raises Unsupported with the reason."""
    if peer is not None:
        return peer.prepare(inputs)
    reason = backends.get(name).supports(Problem(inputs.spec, inputs.q.device))
    if reason is not None:
        raise peer_data.Unsupported(reason)
    return our_call(inputs, name)


def run_case(
    case: Case, dtype: torch.dtype, ours: list[str], theirs: dict[str, peer_data.Peer], device: torch.device, *,
    seconds: float, min_rounds: int, mixed: bool = True,
) -> Report:  # fmt: skip
    """Checks and times every competitor on one case. The report's machine record holds the ceilings of this run alone."""
    report = Report({})
    spec = case.with_dtype(dtype)
    num_sets = 2 if case_data.kv_bytes(spec, case.requests) < ROTATE_BELOW_BYTES else 1
    sets = [case_data.device_inputs(case, dtype, device, seed=seed) for seed in range(num_sets)]
    oracle = Oracle(sets[0])
    calls, errors = {}, {}
    for name in [*ours, *theirs]:
        try:
            prepared = [prepare(name, inputs, theirs.get(name)) for inputs in sets]
            errors[name] = oracle.check(prepared[0]())
            calls[name] = prepared
        except (peer_data.Unsupported, RedCheck) as reason:
            report.refused.append({"case": case.name, "backend": name, "dtype": dtype_name(dtype), "why": str(reason)})
        except Exception as error:  # whatever somebody else's library raises: reported in its place, and the others still run
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            report.refused.append({"case": case.name, "backend": name, "dtype": dtype_name(dtype), "why": why})
    if not calls:
        return report
    parts: dict[str, list] = {}
    if mixed and case_data.is_mixed(case.requests):
        for kind, keep in _kinds(case.requests).items():
            part_sets = [case_data.part(inputs, keep) for inputs in sets]
            for name in ours:
                if name in calls and name != "reference":
                    parts[f"{name} {kind}"] = [our_call(inputs, name) for inputs in part_sets]
    timings = measure(calls | parts | probes(device, dtype), device, seconds=seconds, min_rounds=min_rounds)
    ceilings = ceilings_from(timings, device, dtype)
    report.machine["ceilings"] = ceilings
    work = attention_work(spec, case.requests)
    report.rows = [make_row(SUBJECT, case.name, name, dtype, timings[name], work, ceilings, errors[name]) for name in calls]
    add_ratios(report.rows, set(theirs))
    report.mixed = [_mixed(case, name, dtype, timings) for name in calls if f"{name} prefill" in parts]
    return report


def _kinds(requests) -> dict[str, list[int]]:
    return {
        "prefill": [i for i, (q_len, _) in enumerate(requests) if q_len > 1],
        "decode": [i for i, (q_len, _) in enumerate(requests) if q_len == 1],
    }


def _mixed(case: Case, name: str, dtype: torch.dtype, timings: dict[str, Timing]) -> dict:
    """How one launch for the mixed batch compares with its parts, each alone: 1.0 over the longer part would be perfect overlap."""
    whole, prefill, decode = (timings[key].us for key in (name, f"{name} prefill", f"{name} decode"))
    return {
        "case": case.name,
        "backend": name,
        "dtype": dtype_name(dtype),
        "mixed_us": round(whole, 3),
        "prefill_us": round(prefill, 3),
        "decode_us": round(decode, 3),
        "over_max": round(whole / max(prefill, decode), 4),
        "over_sum": round(whole / (prefill + decode), 4),
    }


def run(
    cases: list[Case], dtypes: list[torch.dtype], *, names: list[str] | None = None, device: torch.device | str = "cpu",
    seconds: float = 1.0, min_rounds: int = 5, mixed: bool = True, save_to: str | None = None, log=print,
) -> Report:  # fmt: skip
    """Every case in every dtype. Cases that do not fit the device's memory are refused, with the sizes.

    Args:
        save_to: written after every case, so that a run cut short leaves what it had.
    """
    device = torch.device(device)
    ours, theirs, absent = competitors(names, device)
    # A backend that cannot run on this device at all is absent; one that refuses a single case is refused there.
    for name in list(ours):
        reasons = {backends.get(name).supports(Problem(c.with_dtype(d), device)) for c in cases for d in dtypes}
        if None not in reasons:
            absent[name] = "; ".join(sorted(reasons))
            ours.remove(name)
    ceilings = Ceilings({}, 0.0)
    report = Report(machine_record(device), absent=absent)
    for case in cases:
        for dtype in dtypes:
            need, free = 4 * case_data.kv_bytes(case.with_dtype(dtype), case.requests), _free_bytes(device)
            if need > free:
                why = f"needs about {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
                report.refused.append({"case": case.name, "backend": "*", "dtype": dtype_name(dtype), "why": why})
                continue
            log(f"{case.name} {dtype_name(dtype)} ...")
            one = run_case(case, dtype, ours, theirs, device, seconds=seconds, min_rounds=min_rounds, mixed=mixed)
            ceilings = ceilings.joined(one.machine.get("ceilings", ceilings))
            one.machine = {}
            report.extend(one)
            report.machine["ceilings"] = ceilings._asdict()
            if save_to:
                report.save(save_to)
    return report


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as meminfo:
        for line in meminfo:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    raise OSError("/proc/meminfo has no MemAvailable")
