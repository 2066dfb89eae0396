"""A request: its tokens and how many of them are in the KV cache. There is no phase: a decode is one token to compute."""

from __future__ import annotations

import array
import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to choose a request's tokens and when to stop.

    Attributes:
        max_tokens: most tokens to generate.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: choose among the k most likely tokens; 0 is all.
        top_p: choose among the fewest tokens whose probabilities reach this sum.
        seed: the request's own; the same seed gives the same tokens whatever else runs. None takes the engine's.
        stop: the output ends before the first of these strings.
        ignore_eos: go on after an end-of-sequence token.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        if not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise ValueError(f"max_tokens must be a positive int, got {self.max_tokens!r}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be 0 or a positive number, got {self.temperature!r}")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all) or a positive int, got {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p!r}")
        if any(not isinstance(s, str) or not s for s in self.stop) or isinstance(self.stop, str):
            raise ValueError(f"stop must be a tuple of strings that are not empty, got {self.stop!r}")


@dataclasses.dataclass(eq=False)
class Request:
    """One request, from arrival to its last token.

    Attributes:
        request_id: unique among the unfinished requests.
        tokens: the prompt, then what was generated.
        sampling: how to choose tokens.
        arrival: time of arrival, seconds on the engine's clock.
        ttft_deadline: seconds after arrival by which the first token is wanted; policies may look, None is no wish.
        tbt_deadline: seconds between tokens that are wished for at most.
        num_prompt_tokens: length of the prompt within `tokens`.
        num_computed_tokens: leading tokens whose keys and values are in the cache.
        pages: pages of the KV cache that hold them, in order (an int32 array, so that a batch copies it in one go).
        num_preemptions: times that its pages were taken and its tokens had to be computed again.
        finish_reason: None while unfinished, then "stop", "length" or "abort".
    """

    request_id: str
    tokens: list[int]
    sampling: SamplingParams = SamplingParams()
    arrival: float = 0.0
    ttft_deadline: float | None = None
    tbt_deadline: float | None = None
    num_prompt_tokens: int = 0
    num_computed_tokens: int = 0
    pages: array.array = dataclasses.field(default_factory=lambda: array.array("i"))
    num_preemptions: int = 0
    finish_reason: str | None = None

    def __post_init__(self):
        self.num_prompt_tokens = self.num_prompt_tokens or len(self.tokens)

    @property
    def remaining(self) -> int:
        """Tokens yet to compute before the next one can be sampled: 1 for a decode, more for a prompt under way."""
        return len(self.tokens) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def output(self) -> list[int]:
        """The generated tokens."""
        return self.tokens[self.num_prompt_tokens :]


class View(NamedTuple):
    """What a policy sees of the scheduler. It must change nothing.

    Attributes:
        running: admitted requests, oldest first. Each has the pages it needs for its next token.
        waiting: requests that could be admitted now, together and in this order; those beyond would not fit.
        chunk: (remaining, budget) -> how much of a prompt to take, aligned to the kernel's tiles.
    """

    running: tuple[Request, ...]
    waiting: tuple[Request, ...]
    chunk: Callable[[int, int], int]


Batch = list[tuple[Request, int]]
