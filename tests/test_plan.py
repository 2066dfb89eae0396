"""A plan covers each visible (query row, key) pair exactly once, writes each row exactly once, and refuses bad input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sarathi_kernels as sk
from sarathi_kernels.backends import PlanConfig
from sarathi_kernels.plan import (
    KV_BEGIN, KV_END, MERGE_ITEM_FIELDS, PARTIAL_ROW, PREFILL_TILE, REQUEST, ROW_BEGIN, ROW_COUNT, TILE_CLASS, WORK_ITEM_FIELDS,
)  # fmt: skip

SETTINGS = settings(max_examples=150, deadline=None)

requests = st.lists(st.tuples(st.integers(0, 70), st.integers(0, 150)), min_size=0, max_size=6)
specs = st.builds(
    lambda heads, page, causal, window: sk.AttentionSpec(*heads, 16, page_size=page, causal=causal, window_left=window),
    st.sampled_from([(4, 4), (8, 2), (9, 3), (7, 1)]),
    st.sampled_from([1, 3, 16]),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 20, 1000]),
)
configs = st.builds(PlanConfig, st.sampled_from([1, 4, 16]), st.sampled_from([16, 24, 128]), st.sampled_from([1, 16, 48]), st.sampled_from([7, 64]))


def make(spec, requests, config=None, **kwargs):
    q_lens, kv_lens = [r[0] for r in requests], [r[1] for r in requests]
    pages = [-(-n // spec.page_size) for n in kv_lens]
    table = torch.zeros(len(requests), max(pages, default=0), dtype=torch.int32)
    cu = torch.tensor(np.cumsum([0, *q_lens]), dtype=torch.int32)
    return sk.plan(spec, cu, torch.tensor(kv_lens, dtype=torch.int32), table, backend="reference", config=config, **kwargs)


def visible(spec, q_len, kv_len):
    """[rows, keys] bool, written from the definition rather than from the planner's interval arithmetic."""
    seen = np.zeros((q_len * spec.group, kv_len), dtype=bool)
    for row in range(q_len * spec.group):
        position = kv_len - q_len + row // spec.group
        for key in range(kv_len):
            seen[row, key] = (not spec.causal or key <= position) and (spec.window_left < 0 or key >= position - spec.window_left)
    return seen


@SETTINGS
@given(specs, requests, configs)
def test_each_visible_pair_once(spec, requests, config):
    plan = make(spec, requests, config)
    covered = [np.zeros((q * spec.group, k), dtype=int) for q, k in requests]
    for item in plan.work_items.tolist():
        row, count = item[ROW_BEGIN], item[ROW_COUNT]
        covered[item[REQUEST]][row : row + count, item[KV_BEGIN] : item[KV_END]] += 1
    for (q_len, kv_len), count in zip(requests, covered):
        seen = visible(spec, q_len, kv_len)
        assert (count[seen] == 1).all(), "a visible pair is missing or counted twice"
        assert (count <= 1).all(), "a hidden pair is visited twice"


@SETTINGS
@given(specs, requests, configs)
def test_each_row_is_written_once(spec, requests, config):
    plan = make(spec, requests, config)
    writers = [np.zeros(q * spec.group, dtype=int) for q, _ in requests]
    direct = [i for i in plan.work_items.tolist() if i[PARTIAL_ROW] < 0]
    for request, row, count in [i[:3] for i in direct] + [m[:3] for m in plan.merge_items.tolist()]:
        writers[request][row : row + count] += 1
    assert all((w == 1).all() for w in writers)


@SETTINGS
@given(specs, requests, configs)
def test_merges_are_complete(spec, requests, config):
    plan = make(spec, requests, config)
    slots = np.zeros(int(plan.counts[3]), dtype=int)
    parts = {}
    for item in plan.work_items.tolist():
        fields = dict(zip(WORK_ITEM_FIELDS, item))
        assert (fields["partial_row"] >= 0) == (fields["merge_index"] >= 0)
        if fields["merge_index"] >= 0:
            parts.setdefault(fields["merge_index"], []).append(fields)
            slots[fields["partial_row"] : fields["partial_row"] + fields["row_count"]] += 1
    assert (slots == 1).all(), "each partial row belongs to one split"
    assert sorted(parts) == list(range(plan.num_merges))
    for index, merge in enumerate(plan.merge_items.tolist()):
        merge = dict(zip(MERGE_ITEM_FIELDS, merge))
        splits = sorted(parts[index], key=lambda f: f["split_index"])
        assert [s["split_index"] for s in splits] == list(range(merge["num_splits"])) and merge["num_splits"] > 1
        for s in splits:
            assert all(s[name] == merge[name] for name in ("request", "row_begin", "row_count", "q_begin", "q_len", "kv_len"))
            assert s["partial_row"] == merge["partial_row"] + s["split_index"] * merge["row_count"]
        split = config.prefill_split if splits[0]["tile_class"] == PREFILL_TILE else config.decode_split
        assert all(s["kv_begin"] % split == 0 for s in splits[1:]), "splits are cut at absolute multiples"


@SETTINGS
@given(specs, requests, configs)
def test_prefill_first_and_longest_first(spec, requests, config):
    plan = make(spec, requests, config)
    classes = plan.work_items[:, TILE_CLASS].tolist()
    assert classes == sorted(classes, reverse=True)
    assert plan.num_prefill_items == sum(classes)
    lengths = (plan.work_items[:, KV_END] - plan.work_items[:, KV_BEGIN]).tolist()
    for part in (lengths[: plan.num_prefill_items], lengths[plan.num_prefill_items :]):
        for a, b in zip(part, part[1:]):
            assert b <= max(a * 1.25 + 64, 64), "longest first, to within a bucket"


@SETTINGS
@given(specs, requests, configs, st.randoms())
def test_a_request_is_planned_alike_in_any_company(spec, requests, config, random):
    def rows_of(plan, i):
        keep = [c for c, name in enumerate(WORK_ITEM_FIELDS) if name not in ("request", "q_begin", "partial_row", "merge_index")]
        return sorted(tuple(item[c] for c in keep) for item in plan.work_items.tolist() if item[REQUEST] == i)

    together = make(spec, requests, config)
    order = list(range(len(requests)))
    random.shuffle(order)
    shuffled = make(spec, [requests[i] for i in order], config)
    for place, i in enumerate(order):
        alone = rows_of(make(spec, [requests[i]], config), 0)
        assert rows_of(together, i) == alone == rows_of(shuffled, place)


@SETTINGS
@given(specs, requests, configs)
def test_cost_counts_visible_pairs(spec, requests, config):
    plan = make(spec, requests, config)
    pairs = sum(int(visible(spec, q, k).sum()) for q, k in requests)
    cost = plan.cost()
    assert cost.flops.sum() == 4 * spec.head_dim * spec.num_kv_heads * pairs
    assert cost.flops.shape == cost.bytes.shape == (plan.num_items,)
    assert (cost.bytes > 0).all()


def test_a_plan_in_a_workspace_allocates_nothing_the_second_time():
    spec, workspace = sk.AttentionSpec(8, 2, 64), sk.Workspace()
    first = make(spec, [(1, 5000), (40, 600)], workspace=workspace)
    second = make(spec, [(1, 4000), (30, 600)], workspace=workspace)
    for name in ("work_items", "partial_out", "partial_lse"):
        assert getattr(first, name).untyped_storage().data_ptr() == getattr(second, name).untyped_storage().data_ptr()
    fresh = make(spec, [(1, 4000), (30, 600)])
    assert torch.equal(second.work_items, fresh.work_items) and torch.equal(second.merge_items, fresh.merge_items)


SPEC = sk.AttentionSpec(8, 2, 64, page_size=16)
GOOD = dict(cu_seqlens_q=[0, 3, 4], seqused_k=[3, 20], block_table=[[1, 0], [4, 2]])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(cu_seqlens_q=[0, 3]), r"cu_seqlens_q 2 entries \(want 3\)"),
        (dict(block_table=[[1, 0]]), r"block_table 1 rows \(want 2\)"),
        (dict(cu_seqlens_q=[1, 3, 4]), r"cu_seqlens_q\[0\] must be 0, got 1"),
        (dict(cu_seqlens_q=[0, 3, 2]), r"cu_seqlens_q\[1\] = 3 but cu_seqlens_q\[2\] = 2"),
        (dict(seqused_k=[3, -20]), r"seqused_k\[1\] must not be negative, got -20"),
        (dict(seqused_k=[3, 33]), r"seqused_k\[1\] = 33 needs 3 pages of 16 tokens, but block_table has 2 columns"),
        (dict(block_table=[[1, 0], [4, -1]]), r"block_table\[1, 1\] = -1 is no page, but seqused_k\[1\] = 20 needs it"),
        (dict(block_table=[1, 0]), r"block_table must be 2-D int32, got 1-D"),
    ],
)
def test_bad_input_is_refused_by_value(change, message):
    values = {name: torch.tensor(v, dtype=torch.int32) for name, v in {**GOOD, **change}.items()}
    with pytest.raises(ValueError, match=message):
        sk.plan(SPEC, **values, backend="reference")


def test_wrong_dtype_is_refused():
    values = {name: torch.tensor(v, dtype=torch.int32) for name, v in GOOD.items()}
    with pytest.raises(ValueError, match="seqused_k must be 1-D int32, got 1-D torch.int64"):
        sk.plan(SPEC, values["cu_seqlens_q"], values["seqused_k"].long(), values["block_table"])


def test_unused_table_entries_may_hold_anything():
    values = {name: torch.tensor(v, dtype=torch.int32) for name, v in {**GOOD, "block_table": [[1, -7], [4, 2]]}.items()}
    assert sk.plan(SPEC, **values, backend="reference").max_page == 4


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(num_kv_heads=3), "num_kv_heads must divide num_q_heads, got 8 query heads and 3 kv heads"),
        (dict(head_dim=0), "head_dim must be a positive int, got 0"),
        (dict(page_size=2.5), "page_size must be a positive int, got 2.5"),
        (dict(dtype=torch.int32), "dtype must be one of .*, got torch.int32"),
        (dict(kv_dtype=torch.bfloat16), "kv_dtype must equal dtype torch.float32 or be a quantized type"),
        (dict(window_left=-2), "window_left must be -1"),
        (dict(softcap=-1.0), "softcap must be 0"),
        (dict(softmax_scale=float("nan")), "softmax_scale must be finite"),
    ],
)
def test_bad_spec_is_refused_by_value(fields, message):
    with pytest.raises(ValueError, match=message):
        sk.AttentionSpec(**{**dict(num_q_heads=8, num_kv_heads=2, head_dim=64), **fields})
