"""python -m engine demo | chat"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from engine.config import DTYPES, EngineConfig
from engine.policies import POLICIES


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m engine", description="A thin serving engine over sarathi_kernels.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="six chats stream, two long prompts arrive: prefill_first against sarathi")
    demo.add_argument("--json", metavar="FILE", help="write the figures there")
    chat = commands.add_parser("chat", help="answer one prompt, streaming")
    chat.add_argument("prompt")
    chat.add_argument("--system", help="system message, instead of the model's own")
    chat.add_argument("--max-tokens", type=int, default=256)
    chat.add_argument("--temperature", type=float, default=0.0)
    chat.add_argument("--top-k", type=int, default=0)
    chat.add_argument("--top-p", type=float, default=1.0)
    chat.add_argument("--seed", type=int)
    chat.add_argument("--policy", choices=POLICIES, default="sarathi")
    for command in (demo, chat):
        command.add_argument("--model", default="smollm2", help="GGUF file, or directory of safetensors")
        command.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
        command.add_argument("--backend", default="auto", help="of the attention op")
    options = parser.parse_args(arguments)
    config = EngineConfig(model=options.model, dtype=options.dtype, backend=options.backend)
    try:
        return run_demo(config, options) if options.command == "demo" else run_chat(config, options)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run_demo(config: EngineConfig, options: argparse.Namespace) -> int:
    from engine.demo import demo

    demo(config, options.json)
    return 0


def run_chat(config: EngineConfig, options: argparse.Namespace) -> int:
    from engine.llm import LLM
    from engine.request import SamplingParams

    llm = LLM(dataclasses.replace(config, policy=options.policy))
    messages = [{"role": "system", "content": options.system}] if options.system else []
    messages.append({"role": "user", "content": options.prompt})
    llm.add_request(messages, SamplingParams(options.max_tokens, options.temperature, options.top_k, options.top_p, options.seed))
    while llm.num_unfinished:
        for output in llm.step():
            print(output.text, end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
