"""Six chats are streaming when two long prompts arrive: the same arrivals under both policies, side by side."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from engine.config import DTYPES, EngineConfig
from engine.llm import LLM
from engine.metrics import Trace, longest_stall, summarize
from engine.request import Request, SamplingParams
from engine.tokenizer import Tokenizer
from engine.weights import find_model, load_weights

CHATS = (
    "What is gravity?",
    "Give me three tips for staying healthy.",
    "Write a Python function that returns the nth Fibonacci number.",
    "Why do we have leap years?",
    "Explain in simple words how a bicycle stays upright.",
    "Suggest a simple dinner with potatoes and eggs.",
)
LONG = {"stalls": "What is the main idea of this text?", "lighthouse": "Who is Marit, and what did she do?"}
CHAT_TOKENS, LONG_TOKENS = 96, 64
LONG_ARRIVE_AFTER = 60  # output tokens: by then every chat is in mid-answer
BUDGETS = {"prefill_first": None, "sarathi": 256}  # None: as many as a prompt may have, as in the scheduler it stands for


@dataclasses.dataclass
class Run:
    """One policy's run: requests and traces in order of arrival, times from the first arrival on."""

    policy: str
    requests: list[Request]
    traces: list[Trace]

    @property
    def long_arrival(self) -> float:
        return self.traces[-1].arrival


def demo(config: EngineConfig, json_path: str | None = None, out: Path = Path("out")) -> dict[str, dict[str, float]]:
    """Runs both policies, prints answers and table, writes the timeline and, if asked, the figures as JSON."""
    started = time.perf_counter()
    path = find_model(config.model)
    weights, tokenizer = load_weights(path, DTYPES[config.resolved_dtype]), Tokenizer.load(path)
    runs = []
    for policy, budget in BUDGETS.items():
        llm = LLM(dataclasses.replace(config, policy=policy, token_budget=budget), weights=weights, tokenizer=tokenizer)
        if not runs:
            print(f"{path.name}, {config.resolved_dtype}, attention backend {llm.runner.builder.backend}, ready in {time.perf_counter() - started:.1f} s")
        llm.generate(["warm up"], SamplingParams(max_tokens=2))
        print(f"\n{policy}: {len(CHATS)} chats now, {len(LONG)} long prompts after {LONG_ARRIVE_AFTER} tokens")
        runs.append(_serve(llm, policy, _progress(sys.stdout.isatty())))
    _print_answers(runs[-1], tokenizer)
    figures = {run.policy: summarize(run.traces) for run in runs}
    print("\n" + table(figures))
    ratio = figures["prefill_first"]["longest_stall_s"] / figures["sarathi"]["longest_stall_s"]
    print(f"\nThe longest stall is {ratio:.1f} times shorter under sarathi.")
    from engine.timeline import draw  # matplotlib is slow to import and only the picture needs it

    out.mkdir(parents=True, exist_ok=True)
    draw([(run.policy, run.traces, longest_stall(run.traces)) for run in runs], len(CHATS), out / "demo_timeline.png")
    print(f"Timeline: {out / 'demo_timeline.png'}")
    if json_path:
        Path(json_path).write_text(json.dumps({"policies": figures}, indent=2) + "\n")
    return figures


def long_prompt(name: str) -> list[dict[str, str]]:
    """One of the two long prompts, as a conversation."""
    text = (Path(__file__).parent / "texts" / f"{name}.txt").read_text(encoding="utf-8")
    return [{"role": "user", "content": f"{text}\n{LONG[name]} Answer in two sentences."}]


def _serve(llm: LLM, policy: str, progress: Callable[[float, list[Request]], None]) -> Run:
    begin = llm.clock()
    requests = [llm.add_request([{"role": "user", "content": text}], SamplingParams(CHAT_TOKENS), arrival=begin) for text in CHATS]
    traces = [Trace(request.request_id, 0.0) for request in requests]
    by_id = {trace.request_id: trace for trace in traces}
    count = 0
    while llm.num_unfinished:
        if count >= LONG_ARRIVE_AFTER and len(requests) == len(CHATS):
            now = llm.clock()
            for name in LONG:
                requests.append(llm.add_request(long_prompt(name), SamplingParams(LONG_TOKENS), arrival=now))
                traces.append(Trace(requests[-1].request_id, now - begin))
                by_id[traces[-1].request_id] = traces[-1]
        for output in llm.step():
            by_id[output.request_id].times.append(output.time - begin)
            count += 1
        progress(llm.clock() - begin, requests)
    return Run(policy, requests, traces)


def _progress(live: bool) -> Callable[[float, list[Request]], None]:
    """Prints where every request stands: in place on a terminal, a line each half second elsewhere."""
    last = 0.0

    def show(now: float, requests: list[Request]) -> None:
        nonlocal last
        done = all(r.finish_reason for r in requests)
        if not live and now - last < 0.5 and not done:
            return
        last = now
        cells = []
        for r in requests:
            reading = not r.num_output_tokens
            cells.append(f"[{r.num_computed_tokens}/{r.num_prompt_tokens}]" if reading else f"{r.num_output_tokens}{'.' if r.finish_reason else ''}")
        line = f"  {now:5.1f} s  " + " ".join(f"{c:>4}" for c in cells)
        print(f"\r{line:<78}" if live else line, end="\n" if done or not live else "", flush=True)

    return show


def _print_answers(run: Run, tokenizer: Tokenizer) -> None:
    questions = [*CHATS, *(f"[{r.num_prompt_tokens} tokens] {q}" for r, q in zip(run.requests[-len(LONG) :], LONG.values(), strict=True))]
    for question, request in zip(questions, run.requests, strict=True):
        answer = " ".join(tokenizer.decode(request.output).split())
        print(f"\n> {question}\n{answer}{' ...' if request.finish_reason == 'length' else ''}")


def table(figures: dict[str, dict[str, float]]) -> str:
    """The figures of each policy, one line each."""
    columns = {
        "TTFT P50": "ttft_p50_s", "TBT P50": "tbt_p50_s", "TBT P99": "tbt_p99_s", "TBT max": "tbt_max_s",
        "longest stall": "longest_stall_s", "output": "output_tok_s",
    }  # fmt: skip
    lines = [f"{'policy':<14}" + "".join(f"{name:>15}" for name in columns)]
    for policy, row in figures.items():
        cells = (f"{row[key]:.1f} tok/s" if key == "output_tok_s" else f"{row[key]:.3f} s" for key in columns.values())
        lines.append(f"{policy:<14}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)
