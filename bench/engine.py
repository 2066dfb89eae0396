"""`bench engine`: a workload against this project's engine, a peer in the same process, or any OpenAI-compatible URL."""

from __future__ import annotations

import argparse
import datetime
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from bench import openai_client, openvino_engine, vllm_engine, workload
from bench.machine import machine_record
from bench.rows import Report
from bench.serving import Served, parse_goodput, summarize
from bench.workload import Arrival

POLL_SECONDS = 0.001


class Steppable(Protocol):
    """An engine that runs in this process: add requests, step, get (request index, number of new tokens) back."""

    vocab_size: int

    def add(self, index: int, prompt: list[int], output_len: int) -> None: ...

    def step(self) -> Sequence[tuple[int, int]]: ...


class OurEngine:
    """This project's engine behind `Steppable`."""

    def __init__(self, options: dict):
        from engine.config import EngineConfig
        from engine.llm import LLM
        from engine.request import SamplingParams

        self.sampling = lambda n: SamplingParams(max_tokens=n, ignore_eos=True)
        self.llm = LLM(EngineConfig(**options))
        self.vocab_size = self.llm.runner.model.config.vocab_size
        self.index: dict[str, int] = {}

    def add(self, index: int, prompt: list[int], output_len: int) -> None:
        self.index[self.llm.add_request(prompt, self.sampling(output_len)).request_id] = index

    def step(self) -> list[tuple[int, int]]:
        return [(self.index[output.request_id], 1) for output in self.llm.step()]


def drive(engine: Steppable, arrivals: Sequence[Arrival], prompts: Sequence[list[int]], clock: Callable[[], float] = time.perf_counter) -> list[Served]:
    """Runs a workload to its end, single-threaded: a request that arrives during a step is seen after it, and its wait counts."""
    served = [Served(a.prompt_len, 0.0) for a in arrivals]
    waiting = list(range(len(arrivals)))
    left = {i: a.output_len for i, a in enumerate(arrivals)}
    produced, running, begin = 0, set(), clock()
    while waiting or running:
        now = clock() - begin
        for i in list(waiting):
            arrival = arrivals[i]
            due = arrival.at is not None and arrival.at <= now
            if due or (arrival.at is None and produced >= arrival.after_tokens):
                served[i].start = arrival.at if due else now
                engine.add(i, prompts[i], arrival.output_len)
                waiting.remove(i)
                running.add(i)
        if not running:
            upcoming = [arrivals[i].at for i in waiting if arrivals[i].at is not None]
            if not upcoming:
                raise RuntimeError(f"{len(waiting)} requests wait for more tokens than the others put out ({produced})")
            time.sleep(max(min(upcoming) - (clock() - begin), POLL_SECONDS))
            continue
        for i, count in engine.step():
            served[i].token_times += [clock() - begin] * count
            produced += count
            left[i] -= count
            if left[i] <= 0:
                running.discard(i)
    return served


def make_workload(args: argparse.Namespace) -> tuple[str, list[Arrival]]:
    """The workload's name, as it will stand in the results, and its arrivals."""
    if args.workload == "interruption":
        return "8 x 512+64, 2 x 1500+64 after 160 tokens", workload.interruption()
    if args.workload == "poisson":
        name = f"{args.trace}, Poisson {args.rate:g}/s, {args.num_prompts} requests up to {args.max_tokens} tokens"
        return name, workload.poisson(args.trace, args.rate, args.num_prompts, seed=args.seed, limit=args.max_tokens)
    name = f"{args.trace} replayed at {args.speed:g}x, {args.num_prompts} requests up to {args.max_tokens} tokens"
    return name, workload.replay(args.trace, args.num_prompts, speed=args.speed, limit=args.max_tokens)


def variants(args: argparse.Namespace) -> list[tuple[str, dict, Callable[[], Steppable]]]:
    """(label, options, constructor) of every engine asked for in this process."""
    chosen = []
    for name in args.engine.split(","):
        if name == "ours":
            for policy, dtype, linear in itertools.product(args.policy.split(","), args.dtype.split(","), args.linear.split(",")):
                options = {"policy": policy, "dtype": dtype, "token_budget": args.budget, "linear": linear, "num_pages": args.num_pages}
                if args.backend:
                    options["backend"] = args.backend
                if policy != "sarathi":
                    options["token_budget"] = None
                chosen.append((f"ours {policy}", options, lambda options=options: OurEngine(options)))
        elif name == "openvino":
            options = {"token_budget": args.budget, "precision": "bf16"}
            chosen.append(("openvino genai", options, lambda: openvino_engine.OpenVinoEngine(args.budget)))
        elif name == "vllm":
            options = {"token_budget": args.budget, "dtype": "bfloat16"}
            chosen.append(("vllm cpu", options, lambda: vllm_engine.VllmEngine(args.budget)))
        else:
            raise ValueError(f"unknown engine {name!r}; there are ours, openvino and vllm, or --url for a server")
    return chosen


def run(args: argparse.Namespace, log=print) -> Report:
    """Every engine asked for on one workload, `--repeats` times, interleaved; all runs are kept."""
    name, arrivals = make_workload(args)
    slo = parse_goodput(args.goodput)
    report = Report(machine_record("cpu"))

    def keep(label: str, model: str, options: dict, served: list[Served], repeat: int):
        head = {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S"),
            "backend": label,
            "model_id": model,
            "workload": name,
            "options": options,
            "goodput_slo_ms": {key: 1e3 * value for key, value in slo.items()},
            "repeat": repeat,
        }
        report.engine.append(head | summarize(served, slo=slo))
        entry = report.engine[-1]
        log(
            f"{label:<24}{entry['output_throughput']:8.1f} tok/s   TTFT p50 {entry['median_ttft_ms']:8.0f} ms   "
            f"ITL p50 {entry['median_itl_ms']:7.1f}  p99 {entry['p99_itl_ms']:7.1f} ms   {entry['completed']}/{entry['num_prompts']}"
        )

    if args.url:
        prompts = workload.prompts(arrivals, args.vocab_size, seed=args.seed)
        for repeat in range(args.repeats):
            served = openai_client.drive(args.url, args.model, arrivals, prompts)
            keep(args.url.split("//")[-1], args.model, {"url": args.url}, served, repeat)
        return report
    engines = []
    for label, options, make in variants(args):
        try:
            engines.append((label, options, make()))
        except ImportError as why:
            report.absent[label] = str(why)
    for label, _, engine in engines:  # compilation, lazy buffers, page faults
        drive(engine, workload.interruption(2, 128, 1, 300, 8), workload.prompts(workload.interruption(2, 128, 1, 300, 8), engine.vocab_size))
        log(f"{label}: warm")
    for repeat in range(args.repeats):
        for label, options, engine in engines:
            prompts = workload.prompts(arrivals, engine.vocab_size, seed=args.seed + repeat)
            keep(label, args.model, options, drive(engine, arrivals, prompts), repeat)
    return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workload", choices=("interruption", "poisson", "trace"), default="interruption")
    parser.add_argument("--trace", default="azure_conv", help="a CSV in bench/data, for poisson and trace")
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second, for poisson")
    parser.add_argument("--speed", type=float, default=1.0, help="divides a trace's times")
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=2048, help="requests longer than this, prompt and output, are left out")
    parser.add_argument("--goodput", help="SLO in ms, e.g. ttft:2000,itl:200")
    parser.add_argument("--engine", default="ours", help="ours, openvino, vllm, comma-separated")
    parser.add_argument("--policy", default="sarathi", help="of our engine, comma-separated")
    parser.add_argument("--budget", type=int, default=256, help="token budget per step")
    parser.add_argument("--linear", default="dense", help="dense or int8, of our engine, comma-separated")
    parser.add_argument("--num-pages", type=int, default=1024)
    parser.add_argument("--url", help="an OpenAI-compatible server, e.g. http://127.0.0.1:8000")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--vocab-size", type=int, default=49152, help="of the server's model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
