"""Queues, admission and preemption, written once. Which of the admissible requests run, and how far, is the policy's.

    waiting --admit: pages for all its tokens--> running --last token--> finished
       ^------------- preempt: pages taken ---------|
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence

import sarathi_kernels as sk

from engine.pages import PageAllocator
from engine.request import Batch, Request, View

Policy = Callable[[View, int], Batch]


class Scheduler:
    """First come, first served, in whatever classes the policy makes.

    Args:
        policy: from `engine.policies`.
        pages: the KV cache's pages.
        token_budget: most tokens per step.
        max_num_seqs: most running requests.
        max_model_len: most tokens of one request; at most what the cache holds, so that one request alone always fits.
        eos_ids: tokens that end a request.
        tile: granularity of chunks (`sarathi_kernels.tile_tokens`).
        watermark: part of the pages that admission leaves free while others run, for those others to grow into.
    """

    def __init__(
        self,
        policy: Policy,
        pages: PageAllocator,
        *,
        token_budget: int,
        max_num_seqs: int,
        max_model_len: int,
        eos_ids: Sequence[int] = (),
        tile: int = 1,
        watermark: float = 0.01,
    ):
        capacity = pages.num_pages * pages.page_size
        if max_model_len > capacity:
            raise ValueError(f"max_model_len {max_model_len} exceeds the KV cache: {pages.num_pages} pages of {pages.page_size} tokens")
        if token_budget < 1 or max_num_seqs < 1:
            raise ValueError(f"token_budget and max_num_seqs must be positive, got {token_budget} and {max_num_seqs}")
        self.policy, self.pages = policy, pages
        self.token_budget, self.max_num_seqs, self.max_model_len = token_budget, max_num_seqs, max_model_len
        self.eos_ids = frozenset(eos_ids)
        self.reserve = int(watermark * pages.num_pages)
        self.chunk = functools.partial(sk.aligned_chunk, tile=tile)
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self._by_id: dict[str, Request] = {}

    @property
    def num_unfinished(self) -> int:
        return len(self._by_id)

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            ValueError: the prompt is empty or leaves no room for a token within the limit, or the id is in use.
        """
        length = len(request.tokens)
        if not length:
            raise ValueError(f"request {request.request_id!r} has an empty prompt")
        if length >= self.max_model_len:
            raise ValueError(
                f"request {request.request_id!r} has a prompt of {length} tokens; the limit is {self.max_model_len - 1} "
                f"(max_model_len {self.max_model_len}, prompt and output together; the KV cache holds "
                f"{self.pages.num_pages * self.pages.page_size} tokens)"
            )
        if request.request_id in self._by_id:
            raise ValueError(f"request id {request.request_id!r} is in use by an unfinished request")
        self._by_id[request.request_id] = request
        self.waiting.append(request)

    def abort(self, request_id: str) -> Request | None:
        """Ends a request in whatever state it is; None if there is no such unfinished request (it may just have ended)."""
        request = self._by_id.get(request_id)
        if request is not None:
            self._finish(request, "abort")
        return request

    def schedule(self) -> Batch:
        """The next step's batch: [(request, num_tokens)], empty only when nothing is unfinished.

        Takes pages and moves requests between the queues, but computes nothing: after a step that failed, ask again.
        """
        preempted = self._make_room()
        waiting = () if preempted else self._admissible()
        batch = self.policy(View(tuple(self.running), waiting, self.chunk), self.token_budget)
        total = sum(n for _, n in batch)
        if total > self.token_budget:
            raise RuntimeError(f"policy {self.policy.__name__} scheduled {total} tokens on a budget of {self.token_budget}")
        if not batch and self._by_id:
            raise RuntimeError(
                f"policy {self.policy.__name__} scheduled nothing with {len(self.running)} requests running and {len(waiting)} admissible"
            )
        admitted = {id(request) for request in waiting}
        for request, _ in batch:
            if id(request) in admitted:
                self._admit(request)
        return batch

    def update(self, batch: Batch, tokens: Sequence[int | None]) -> list[tuple[Request, int]]:
        """Books a step's results.

        Args:
            batch: what was run.
            tokens: the sampled token of each entry; None where the chunk did not reach the request's last token.

        Returns:
            (request, token) for each new token; `finish_reason` is set on those it finished.
        """
        news = []
        for (request, n), token in zip(batch, tokens, strict=True):
            if request.finish_reason:  # aborted while the step ran
                continue
            request.num_computed_tokens += n
            if token is None:
                continue
            request.tokens.append(token)
            news.append((request, token))
            if token in self.eos_ids and not request.sampling.ignore_eos:
                self._finish(request, "stop")
            elif request.num_output_tokens >= request.sampling.max_tokens or len(request.tokens) >= self.max_model_len:
                self._finish(request, "length")
        return news

    def finish(self, request: Request) -> None:
        """Ends a running request because its text is complete (a stop string)."""
        self._finish(request, "stop")

    def _make_room(self) -> bool:
        """Gives every running request the page its next token needs, oldest first, preempting the newest for it."""
        preempted = False
        for request in list(self.running):
            if not request.pages:  # preempted further up
                break
            while (need := self.pages.pages_for(len(request.tokens)) - len(request.pages)) > self.pages.num_free:
                preempted = True
                if self._preempt_newest() is request:
                    return True
            request.pages.extend(self.pages.allocate(need) if need > 0 else ())
        return preempted

    def _admissible(self) -> tuple[Request, ...]:
        """The leading waiting requests that fit together: a seat each, and pages for all tokens they have now."""
        seats, free = self.max_num_seqs - len(self.running), self.pages.num_free
        requests = []
        for request in self.waiting:
            free -= self.pages.pages_for(len(request.tokens))
            alone = not self.running and not requests
            if len(requests) == seats or free < (0 if alone else self.reserve):
                break
            requests.append(request)
        return tuple(requests)

    def _admit(self, request: Request) -> None:
        request.pages.extend(self.pages.allocate(self.pages.pages_for(len(request.tokens))))
        self.waiting.remove(request)
        self.running.append(request)

    def _preempt_newest(self) -> Request:
        """Takes the newest running request's pages; it waits at the front and computes its tokens again."""
        request = self.running.pop()
        self._release(request)
        request.num_preemptions += 1
        self.waiting.appendleft(request)
        return request

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        del self._by_id[request.request_id]
        (self.running if request.pages else self.waiting).remove(request)
        self._release(request)

    def _release(self, request: Request) -> None:
        self.pages.release(request.pages)
        del request.pages[:]
        request.num_computed_tokens = 0
