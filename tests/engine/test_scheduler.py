"""The scheduler over a runner that is fake but checks: its cache holds tokens, its next token hashes all of them."""

import pytest
from engine.pages import PageAllocator
from engine.policies import POLICIES, sarathi
from engine.request import Request, SamplingParams
from engine.scheduler import Scheduler
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

EOS = 0


def next_token(tokens):
    """A function of all tokens so far: any lost, doubled or misplaced token changes what follows."""
    return hash(tuple(tokens)) % 23  # ints hash to the same value in every process


def expected_output(prompt, sampling, limit):
    tokens = list(prompt)
    while len(tokens) - len(prompt) < sampling.max_tokens and len(tokens) < limit:
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS and not sampling.ignore_eos:
            break
    return tokens[len(prompt) :]


class FakeRunner:
    """Keeps each token in its slot, as the real cache keeps its key, and reads them all back to make the next one."""

    def __init__(self, num_pages, page_size):
        self.page_size = page_size
        self.slots = [None] * (num_pages * page_size)

    def slot(self, request, position):
        return request.pages[position // self.page_size] * self.page_size + position % self.page_size

    def run(self, batch):
        out = []
        for request, n in batch:
            begin = request.num_computed_tokens
            for position in range(begin, begin + n):
                self.slots[self.slot(request, position)] = request.tokens[position]
        for request, n in batch:
            end = request.num_computed_tokens + n
            if end < len(request.tokens):
                out.append(None)
            else:
                out.append(next_token(self.slots[self.slot(request, p)] for p in range(end)))
        return out


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        num_pages=st.integers(2, 24),
        page_size=st.integers(1, 6),
        budget=st.integers(1, 40),
        max_num_seqs=st.integers(1, 6),
        tile=st.integers(1, 9),
    )
    def start(self, policy, num_pages, page_size, budget, max_num_seqs, tile):
        self.policy, self.budget, self.max_num_seqs = policy, budget, max_num_seqs
        self.pages = PageAllocator(num_pages, page_size)
        self.limit = num_pages * page_size
        self.scheduler = Scheduler(
            POLICIES[policy], self.pages, token_budget=budget, max_num_seqs=max_num_seqs, max_model_len=self.limit, eos_ids=[EOS], tile=tile
        )
        self.runner = FakeRunner(num_pages, page_size)
        self.requests, self.order, self.clock = [], {}, 0

    @rule(length=st.integers(1, 40), max_tokens=st.integers(1, 30), ignore_eos=st.booleans(), fill=st.integers(1, 22))
    def add(self, length, max_tokens, ignore_eos, fill):
        request = Request(str(len(self.requests)), [fill] * length, SamplingParams(max_tokens, ignore_eos=ignore_eos))
        if length >= self.limit:
            with pytest.raises(ValueError, match=f"prompt of {length} tokens"):
                self.scheduler.add(request)
            return
        self.scheduler.add(request)
        self.order[request.request_id] = len(self.requests)
        self.requests.append(request)

    @rule()
    def step(self):
        batch = self.checked_batch()
        if batch:
            self.scheduler.update(batch, self.runner.run(batch))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def step_fails(self, data):
        batch = self.checked_batch()
        if data.draw(st.booleans()):  # it may have got as far as writing the cache
            self.runner.run(batch)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        request = data.draw(st.sampled_from(self.requests))
        was = request.finish_reason
        self.scheduler.abort(request.request_id)
        assert request.finish_reason == (was or "abort")

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort_while_a_step_runs(self, data):
        batch = self.checked_batch()
        if not batch:
            return
        tokens = self.runner.run(batch)
        request = data.draw(st.sampled_from(batch))[0]
        self.scheduler.abort(request.request_id)
        news = self.scheduler.update(batch, tokens)
        assert request not in [r for r, _ in news] and request.finish_reason == "abort"

    def checked_batch(self):
        unfinished = [r for r in self.requests if not r.finish_reason]
        preemptions = sum(r.num_preemptions for r in self.requests)
        batch = self.scheduler.schedule()
        assert bool(batch) == bool(unfinished), "work conserving"
        assert sum(n for _, n in batch) <= self.budget
        assert len({id(r) for r, _ in batch}) == len(batch)
        assert all(1 <= n <= r.remaining for r, n in batch)
        assert all(len(r.pages) >= self.pages.pages_for(r.num_computed_tokens + n) for r, n in batch)
        chosen = {id(r) for r, _ in batch}
        decodes = [r for r in self.scheduler.running if r.remaining == 1 and r.num_output_tokens]
        if self.policy == "sarathi":
            # Those just admitted by this call come last and need not be in; nobody else may be left out within budget.
            assert all(id(r) in chosen for r in decodes[: self.budget])
        else:
            ones = [r for r, _ in batch if r.remaining == 1 and r.num_computed_tokens]
            assert not ones or all(r.remaining == 1 for r, _ in batch), "prompts and decodes in one batch"
        # FCFS among prompts: a younger one gets tokens only if all older ones of this batch got theirs.
        prompts = [self.order[r.request_id] for r, n in batch if r.remaining > 1]
        assert prompts == sorted(prompts)
        if sum(r.num_preemptions for r in self.requests) > preemptions:
            assert all(r.num_computed_tokens for r, _ in batch if r.num_output_tokens), "admitted in the step that preempted"
        return batch

    @invariant()
    def pages_are_conserved(self):
        if not hasattr(self, "scheduler"):
            return
        owned = [p for r in self.requests for p in r.pages]
        assert len(owned) == len(set(owned))
        assert self.pages.num_free + len(owned) == self.pages.num_pages
        assert all(bool(r.pages) == (r in self.scheduler.running) for r in self.requests)
        assert all(r.num_computed_tokens <= min(len(r.tokens), len(r.pages) * self.pages.page_size) for r in self.requests)
        assert len(self.scheduler.running) <= self.max_num_seqs

    @invariant()
    def order_of_arrival_is_kept(self):
        if not hasattr(self, "scheduler"):
            return
        queue = [self.order[r.request_id] for r in [*self.scheduler.running, *self.scheduler.waiting]]
        assert queue == sorted(queue)

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        # Every step computes a token at least. Each request is computed once, and again after each preemption; a preempted
        # request waits until older ones release pages, so preemptions are bounded by the tokens that older ones append.
        bound = 10 + 20 * sum(len(r.tokens) + r.sampling.max_tokens for r in self.requests)
        steps = 0
        while self.scheduler.num_unfinished:
            self.step()
            steps += 1
            assert steps <= bound, "livelock"
        self.pages_are_conserved()
        assert self.pages.num_free == self.pages.num_pages and not self.scheduler.running and not self.scheduler.waiting
        for r in self.requests:
            want = expected_output(r.tokens[: r.num_prompt_tokens], r.sampling, self.limit)
            assert r.output == (want[: len(r.output)] if r.finish_reason == "abort" else want)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def scheduler(num_pages=8, page_size=4, budget=16, **options):
    pages = PageAllocator(num_pages, page_size)
    return Scheduler(
        sarathi, pages, token_budget=budget, **{"max_num_seqs": 8, "max_model_len": num_pages * page_size, "eos_ids": [EOS]} | options
    )


def test_preemption_takes_the_newest_and_puts_it_at_the_front():
    s = scheduler(num_pages=4, watermark=0.0)
    a, b = Request("a", [5] * 7), Request("b", [5] * 7)
    s.add(a), s.add(b)
    while not b.num_preemptions:
        batch = s.schedule()
        if b.num_preemptions:
            break
        s.update(batch, [7] * len(batch))
    s.add(Request("c", [5]))
    assert [r.request_id for r in s.waiting] == ["b", "c"] and b.num_computed_tokens == 0 and not b.pages
    assert [(r.request_id, n) for r, n in batch] == [("a", 1)] and len(a.pages) == 3


def test_a_prompt_that_cannot_fit_is_refused_and_harms_nothing():
    s = scheduler()
    s.add(Request("a", [5] * 4))
    with pytest.raises(ValueError, match=r"'b' has a prompt of 32 tokens; the limit is 31 .*KV cache holds 32 tokens"):
        s.add(Request("b", [5] * 32))
    with pytest.raises(ValueError, match="'c' has an empty prompt"):
        s.add(Request("c", []))
    with pytest.raises(ValueError, match="'a' is in use"):
        s.add(Request("a", [5]))
    assert s.num_unfinished == 1 and [(r.request_id, n) for r, n in s.schedule()] == [("a", 4)]


def test_a_request_ends_at_the_limit_of_the_cache():
    s = scheduler(num_pages=2)
    request = Request("a", [5] * 5, SamplingParams(max_tokens=100))
    s.add(request)
    while s.num_unfinished:
        batch = s.schedule()
        s.update(batch, [7])
    assert request.finish_reason == "length" and len(request.tokens) == 8 and s.pages.num_free == 2


def test_the_watermark_keeps_pages_for_those_that_run():
    s = scheduler(num_pages=11, watermark=0.2)
    s.add(Request("a", [5] * 16)), s.add(Request("b", [5] * 16)), s.add(Request("c", [5] * 4))
    s.update(s.schedule(), [7]), s.schedule()
    assert [r.request_id for r in s.running] == ["a", "b"] and s.pages.num_free == 2


def test_a_policy_over_budget_is_an_error():
    s = scheduler(budget=4)
    s.policy = lambda view, budget: [(r, r.remaining) for r in view.waiting]
    s.add(Request("a", [5] * 9))
    with pytest.raises(RuntimeError, match="scheduled 9 tokens on a budget of 4"):
        s.schedule()


def test_nonsense_configurations_are_refused():
    with pytest.raises(ValueError, match="max_model_len 33 exceeds the KV cache: 8 pages of 4 tokens"):
        scheduler(max_model_len=33)
    with pytest.raises(ValueError, match="must be positive, got 0 and 8"):
        scheduler(budget=0)
