"""The engine: add requests, call `step` until nothing is unfinished."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import sarathi_kernels as sk

from engine.batch import BatchBuilder
from engine.config import DTYPES, EngineConfig
from engine.model import Model
from engine.pages import PageAllocator
from engine.policies import POLICIES
from engine.request import Request, SamplingParams
from engine.runner import Runner
from engine.scheduler import Scheduler
from engine.stream import TextStream
from engine.tokenizer import Tokenizer
from engine.weights import Weights, find_model, load_weights

Prompt = str | Sequence[int] | Sequence[dict[str, str]]


class Output(NamedTuple):
    """One new token of one request.

    Attributes:
        request_id: whose.
        token: its id.
        text: what the stream may show now, possibly "".
        finish_reason: set with the last token: "stop" or "length".
        time: when the step that made it ended, seconds on the engine's clock.
    """

    request_id: str
    token: int
    text: str
    finish_reason: str | None
    time: float


class LLM:
    """A model, its scheduler and its streams.

    Args:
        config: what to serve and how.
        weights: loaded already, to share between engines; by default loaded from `config.model`.
        tokenizer: likewise.
        clock: seconds; only differences matter.

    Raises:
        ValueError: the configuration does not fit the model or the backend, with the values.
    """

    def __init__(
        self,
        config: EngineConfig = EngineConfig(),
        *,
        weights: Weights | None = None,
        tokenizer: Tokenizer | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        path = find_model(config.model)
        weights = weights or load_weights(path, DTYPES[config.resolved_dtype])
        self.config, self.clock = config, clock
        self.tokenizer = tokenizer or Tokenizer.load(path)
        self.max_model_len = self._limit(config, weights.config.max_model_len)
        model = Model(
            weights, page_size=config.page_size, num_pages=config.num_pages, max_model_len=self.max_model_len, linear=config.linear
        )
        budget = config.token_budget or self.max_model_len
        pages = PageAllocator(config.num_pages, config.page_size)
        builder = BatchBuilder(
            model.spec,
            config.backend,
            max_tokens=budget,
            max_num_seqs=config.max_num_seqs,
            max_pages=pages.pages_for(self.max_model_len),
        )
        self.runner = Runner(model, builder, config.seed)
        if config.policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {config.policy!r}")
        self.scheduler = Scheduler(
            POLICIES[config.policy],
            pages,
            token_budget=budget,
            max_num_seqs=config.max_num_seqs,
            max_model_len=self.max_model_len,
            eos_ids=self.tokenizer.eos_ids,
            tile=config.chunk_tile or sk.tile_tokens(model.spec, builder.backend),
        )
        self._streams: dict[str, TextStream] = {}
        self._ids = 0

    def add_request(
        self,
        prompt: Prompt,
        sampling: SamplingParams = SamplingParams(),
        *,
        request_id: str | None = None,
        arrival: float | None = None,
    ) -> Request:
        """Queues a request; `step` serves it.

        Args:
            prompt: raw text, token ids, or a conversation [{"role": ..., "content": ...}].
            sampling: how to choose tokens and when to stop.
            request_id: unique among the unfinished; made up if None.
            arrival: time of arrival on the engine's clock; now if None.

        Raises:
            ValueError: the prompt is empty, too long or has ids outside the vocabulary, or the id is in use.
        """
        if request_id is None:
            request_id, self._ids = f"r{self._ids}", self._ids + 1
        arrival = self.clock() if arrival is None else arrival
        request = Request(request_id, self._encode(prompt), sampling, arrival)
        self.scheduler.add(request)
        self._streams[request_id] = TextStream(self.tokenizer, sampling.stop)
        return request

    def step(self) -> list[Output]:
        """Schedules, runs and books one batch. Returns one output per new token; [] when nothing was unfinished."""
        batch = self.scheduler.schedule()
        if not batch:
            return []
        tokens = self.runner.run(batch)
        now = self.clock()
        return [self._output(request, token, now) for request, token in self.scheduler.update(batch, tokens)]

    def abort(self, request_id: str) -> None:
        """Ends a request, in whatever state. No more output comes of it; unknown ids are let pass, for it may just have ended."""
        self.scheduler.abort(request_id)
        self._streams.pop(request_id, None)

    @property
    def num_unfinished(self) -> int:
        return self.scheduler.num_unfinished

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams = SamplingParams()) -> list[Request]:
        """Serves some prompts to the end; returns their finished requests, in order."""
        requests = [self.add_request(prompt, sampling) for prompt in prompts]
        while self.num_unfinished:
            self.step()
        return requests

    def _output(self, request: Request, token: int, now: float) -> Output:
        stream = self._streams[request.request_id]
        text = stream.push(token, last=request.finish_reason is not None)
        if stream.stopped and not request.finish_reason:
            self.scheduler.finish(request)
        if request.finish_reason:
            del self._streams[request.request_id]
        return Output(request.request_id, token, text, request.finish_reason, now)

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if len(prompt) and isinstance(prompt[0], dict):
            return self.tokenizer.encode_chat(prompt)
        ids, vocab = list(prompt), self.runner.model.config.vocab_size
        wrong = next((t for t in ids if not isinstance(t, int) or not 0 <= t < vocab), None)
        if wrong is not None:
            raise ValueError(f"token ids must be ints in [0, {vocab - 1}], got {wrong!r}")
        return ids

    @staticmethod
    def _limit(config: EngineConfig, model_limit: int) -> int:
        if config.max_model_len is None:
            return min(model_limit, config.cache_tokens)
        if config.max_model_len > min(model_limit, config.cache_tokens):
            raise ValueError(
                f"max_model_len {config.max_model_len} exceeds the model's limit of {model_limit} or the KV cache's "
                f"{config.cache_tokens} tokens ({config.num_pages} pages of {config.page_size})"
            )
        return config.max_model_len
