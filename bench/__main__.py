"""`python -m bench SUBJECT`: attention, append_kv, plan, engine, report, or quick (a ten-minute selection for this machine)."""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import torch

from bench import append_kv, attention, cases, engine, plan, quick, report
from sarathi_kernels import backends

KERNEL_SUBJECTS = {"attention": attention.run, "append_kv": append_kv.run, "plan": plan.run}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    subjects = top.add_subparsers(dest="subject", required=True)
    for name in KERNEL_SUBJECTS:
        sub = subjects.add_parser(name)
        sub.add_argument("--backend", help="ours and peers, comma-separated; default: all that this machine has, less the oracle and flex")
        sub.add_argument("--dtype", default="bfloat16", help="comma-separated, e.g. bfloat16,float32")
        sub.add_argument("--device", help="cpu or cuda; default: cuda where there is one and no named backend is the CPU's")
        sub.add_argument("--seconds", type=float, default=1.0, help="timed seconds per competitor and case")
        if name != "plan":
            sub.add_argument(
                "--cases", default="A/llama8b,B/llama8b,C/llama8b,D/llama8b",
                help=f"names, patterns (A/*) and groups ({', '.join(cases.GROUPS)}; hybrid/llama8b), comma-separated",
            )  # fmt: skip
            sub.add_argument("--page-size", type=int, default=16)
        if name == "attention":
            sub.add_argument("--no-mixed", action="store_true", help="do not time the parts of mixed batches")
            sub.add_argument("--shuffle", action="store_true", help="cases in a random (fixed) order: an interrupted grid is then a sample of it")
        sub.add_argument("--quick", action="store_true", help="three rounds, a fifth of the time")
        sub.add_argument("--json", help="write rows and the machine record here")
    sub = subjects.add_parser("engine")
    engine.add_arguments(sub)
    sub.add_argument("--backend", help="attention backend of our engine")
    sub.add_argument("--dtype", default="auto", help="of our engine: auto, bfloat16 or float32, comma-separated")
    sub.add_argument("--quick", action="store_true", help="one repeat")
    sub.add_argument("--json")
    sub = subjects.add_parser("report")
    report.add_arguments(sub)
    sub = subjects.add_parser("quick")
    sub.add_argument("--out", default="out/bench", help="folder for the results")
    sub.add_argument("--minutes", type=float, default=10.0, help="no new step starts after this")
    return top


def resolve_device(device: str | None, names: list[str] | None) -> torch.device:
    """The device named; else cuda where there is one, unless a CPU-only competitor was named."""
    if device is not None:
        return torch.device(device)
    on_cpu = {"cpu", "openvino", "vllm_cpu", "vllm_cpu_p128", "zentorch"}
    return torch.device("cuda" if torch.cuda.is_available() and not on_cpu & set(names or ()) else "cpu")


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if args.subject == "report":
        return report.main(args)
    if args.subject == "quick":
        return quick.main(Path(args.out), args.minutes)
    if args.subject == "engine":
        args.repeats = 1 if args.quick else args.repeats
        result = engine.run(args)
    else:
        names = args.backend.split(",") if args.backend else None
        dtypes = [getattr(torch, name) for name in args.dtype.split(",")]
        options = {"names": names, "device": resolve_device(args.device, names)}
        options |= {"seconds": args.seconds / 5, "min_rounds": 3} if args.quick else {"seconds": args.seconds}
        if args.subject == "plan":
            result = plan.run(dtypes, **options)
        else:
            chosen = [cases.with_page_size(case, args.page_size) for case in cases.select(args.cases)]
            if args.subject == "attention":
                options |= {"mixed": not args.no_mixed, "save_to": args.json}
                if args.shuffle:
                    random.Random(0).shuffle(chosen)
            result = KERNEL_SUBJECTS[args.subject](chosen, dtypes, **options)
    result.print()
    if args.json:
        result.save(args.json)
    wrong = [r for r in result.refused if r["backend"] in backends.NAMES and ("allowed" in r["why"] or "not finite" in r["why"] or "Error" in r["why"])]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
