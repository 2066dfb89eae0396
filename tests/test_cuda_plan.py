"""The device planner's own source in the host simulator: bit for bit the tables of the host planner."""

import cuda_sim
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sarathi_kernels as sk
from sarathi_kernels.backends import PlanConfig, cuda
from sarathi_kernels.testing import Case, check, make_inputs, make_spec


def host_plan(spec, requests, config):
    kv_lens = [kv for _, kv in requests]
    table = torch.zeros(len(requests), max((-(-n // spec.page_size) for n in kv_lens), default=0), dtype=torch.int32)
    cu_seqlens_q = torch.tensor(np.cumsum([0, *(q for q, _ in requests)]), dtype=torch.int32)
    return sk.plan(spec, cu_seqlens_q, torch.tensor(kv_lens, dtype=torch.int32), table, backend="reference", config=config)


def assert_same_tables(made, host):
    assert made.counts.tolist() == host.counts.tolist()
    assert torch.equal(made.work_items[: len(host.work_items)], host.work_items)
    assert torch.equal(made.merge_items[: len(host.merge_items)], host.merge_items)
    assert (made.work_items[len(host.work_items) :] == -7).all() and (made.merge_items[len(host.merge_items) :] == -7).all()


requests = st.lists(st.tuples(st.integers(0, 70), st.integers(0, 300)), min_size=0, max_size=8)
specs = st.builds(
    lambda heads, causal, window: sk.AttentionSpec(*heads, 16, causal=causal, window_left=window),
    st.sampled_from([(4, 4), (8, 2), (9, 3), (7, 1)]),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 20, 1000, 2**31 - 1]),
)
configs = st.builds(PlanConfig, st.sampled_from([1, 4, 16]), st.sampled_from([16, 24, 128]), st.sampled_from([1, 16, 48]), st.sampled_from([7, 64]))


@settings(max_examples=60, deadline=None)
@given(specs, requests, configs, st.integers(0, 5))
def test_same_tables_as_the_host(spec, requests, config, seed):
    host = host_plan(spec, requests, config)
    assert_same_tables(cuda_sim.plan_on_device(host, seed=seed), host)


def test_more_requests_tiles_and_items_than_threads():
    """Several blocks of threads in each pass, the last one partly filled."""
    rng = np.random.default_rng(0)
    many = [(int(rng.integers(0, 3)), int(rng.integers(0, 60))) for _ in range(1100)] + [(900, 2000), (1, 5000)]
    host = host_plan(make_spec((8, 2)), many, PlanConfig(16, 32, 48, 500))
    assert len(host.work_items) > 2 * 512 and len(host.merge_items) > 100
    items, merges, rows = len(host.work_items) + 5, len(host.merge_items) + 3, len(host.partial_out) + 1
    for seed in (0, 3):
        assert_same_tables(cuda_sim.plan_on_device(host, (items, merges, rows), seed=seed), host)


def test_a_batch_too_large_for_its_tables_says_so_and_attention_writes_nan():
    inputs = make_inputs(Case("split", ((1, 300), (20, 200)), make_spec()), torch.bfloat16)
    config = cuda.plan_config(inputs.spec)._replace(decode_split=64, prefill_split=64)
    host = inputs.plan("reference", config=config)
    exact = (len(host.work_items), len(host.merge_items), len(host.partial_out))
    assert_same_tables(cuda_sim.plan_on_device(host, exact), host)
    for short in range(3):
        capacity = tuple(n - (i == short) for i, n in enumerate(exact))
        made = cuda_sim.plan_on_device(host, capacity)
        assert made.counts.tolist() == [-1, 0, 0, 0], f"capacity {capacity}, needed {exact}"
        out, lse, _ = cuda_sim.attention(inputs, plan=made)
        assert out.isnan().all() and lse.isnan().all()


def test_attention_on_a_device_plan_with_room_to_spare():
    """As a captured graph runs it: the grid covers the tables' capacity, the counts in device memory say what is there."""
    inputs = make_inputs(Case("split", ((1, 300), (20, 200), (1, 1)), make_spec()), torch.float16)
    config = cuda.plan_config(inputs.spec)._replace(decode_split=64, prefill_split=64)
    host = inputs.plan("reference", config=config)
    made = cuda_sim.plan_on_device(host, (len(host.work_items) + 9, len(host.merge_items), len(host.partial_out)), seed=2)
    out, lse, _ = cuda_sim.attention(inputs, plan=made, num_blocks=9, seed=2)
    check(inputs, out, lse)
