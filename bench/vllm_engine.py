"""vLLM's engine on the CPU behind the same stepping interface, on the same weights, which it reads as safetensors."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from bench.peer_model import VOCAB_SIZE, converted

CACHE_GIB = 1


def bfloat16_safetensors(source: Path, target: Path) -> None:
    from engine.weights import load_weights, save_weights

    save_weights(load_weights(source, torch.bfloat16), target, bos=1, eos=2)


class VllmEngine:
    """vLLM's LLMEngine in this process: bfloat16, compiled, chunked prefill, no prefix cache, token ids in and out.

    Args:
        token_budget: max_num_batched_tokens.
        max_model_len: most tokens of a request.

    Raises:
        ImportError: vllm or the model's package is missing.
    """

    def __init__(self, token_budget: int, max_model_len: int = 2048):
        # One process, whose threads stay free: an engine that pinned them would slow down the others of an interleaved run.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(CACHE_GIB))
        os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
        import vllm

        model = converted("bfloat16", bfloat16_safetensors)
        options = vllm.EngineArgs(
            model=str(model), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=max_model_len, max_num_seqs=64,
            max_num_batched_tokens=token_budget, enable_chunked_prefill=True, enable_prefix_caching=False,
        )  # fmt: skip
        self.engine = vllm.LLMEngine.from_engine_args(options)
        self.sampling = lambda n: vllm.SamplingParams(
            max_tokens=n, temperature=0.0, ignore_eos=True, detokenize=False, output_kind=vllm.sampling_params.RequestOutputKind.DELTA
        )
        self.vocab_size = VOCAB_SIZE
        self.index: dict[str, int] = {}
        self.serial = 0

    def add(self, index: int, prompt: list[int], output_len: int) -> None:
        request = str(self.serial)
        self.serial += 1
        self.index[request] = index
        self.engine.add_request(request, {"prompt_token_ids": prompt}, self.sampling(output_len))

    def step(self) -> list[tuple[int, int]]:
        return [(self.index[out.request_id], len(out.outputs[0].token_ids)) for out in self.engine.step() if out.outputs[0].token_ids]
