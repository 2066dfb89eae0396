"""Batches as tensors: the same as the definition, token by token; and quick enough to be forgotten."""

import array
import statistics
import time

import sarathi_kernels as sk
import torch
from engine.batch import BatchBuilder
from engine.request import Request
from hypothesis import given, settings, strategies as st

SPEC = sk.AttentionSpec(num_q_heads=9, num_kv_heads=3, head_dim=64, page_size=16)


def make(entries, page_size=16):
    """[(tokens, computed, n)] -> batch, with pages of its own for each request."""
    batch, page = [], 0
    for i, (length, computed, n) in enumerate(entries):
        count = -(-length // page_size)
        pages = array.array("i", range(page + count - 1, page - 1, -1))
        batch.append((Request(str(i), list(range(1000 * i, 1000 * i + length)), num_computed_tokens=computed, pages=pages), n))
        page += count
    return batch


entry = st.integers(1, 90).flatmap(
    lambda length: st.integers(0, length - 1).flatmap(
        lambda computed: st.tuples(st.just(length), st.just(computed), st.integers(1, length - computed))
    )
)


@given(steps=st.lists(st.lists(entry, min_size=1, max_size=6), min_size=1, max_size=3), page_size=st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_tensors_equal_the_definition(steps, page_size):
    spec = sk.AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=64, page_size=page_size)
    builder = BatchBuilder(spec, "reference", max_tokens=600, max_num_seqs=6, max_pages=90)
    for entries in steps:  # the same builder, so that leftovers of a step would show in the next
        batch = make(entries, page_size)
        step = builder.build(batch)
        rows = [(r, p) for r, n in batch for p in range(r.num_computed_tokens, r.num_computed_tokens + n)]
        assert step.input_ids.tolist() == [r.tokens[p] for r, p in rows]
        assert step.positions.tolist() == [p for _, p in rows]
        assert step.slot_mapping.tolist() == [r.pages[p // page_size] * page_size + p % page_size for r, p in rows]
        ends = torch.tensor([n for _, n in batch]).cumsum(0).tolist()
        assert step.plan.cu_seqlens_q.tolist() == [0, *ends]
        assert step.plan.seqused_k.tolist() == [r.num_computed_tokens + n for r, n in batch]
        assert step.samplers == [i for i, (r, n) in enumerate(batch) if r.num_computed_tokens + n == len(r.tokens)]
        assert step.logit_rows.tolist() == [ends[i] - 1 for i in step.samplers]
        assert torch.equal(step.positions, sk.token_positions(step.plan))
        assert torch.equal(step.slot_mapping, sk.slot_mapping(step.plan))


def test_a_batch_of_64_requests_is_built_in_200_microseconds():
    """The builder's own part; the plan has a limit of its own. The best of many, for the machine may be busy."""
    batch = make([(1000, 999, 1)] * 63 + [(500, 100, 193)])
    builder = BatchBuilder(SPEC, "reference", max_tokens=256, max_num_seqs=64, max_pages=64)
    plan = builder.build(batch).plan
    original, sk.plan = sk.plan, lambda *a, **k: plan
    try:
        times = []
        for _ in range(200):
            started = time.perf_counter()
            builder.build(batch)
            times.append(time.perf_counter() - started)
    finally:
        sk.plan = original
    assert statistics.quantiles(times, n=10)[0] < 200e-6
