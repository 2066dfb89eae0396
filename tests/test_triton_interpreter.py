"""The Triton backend on CPU tensors, in Triton's interpreter: values, bits, the queue, the merge, the planner, the cache."""

import dataclasses
import random

import pytest
import torch

import sarathi_kernels as sk
from sarathi_kernels import testing
from sarathi_kernels.backends import PlanConfig
from sarathi_kernels.plan import Limits
from sarathi_kernels.testing import Case, make_spec

triton = pytest.importorskip("triton")
tl = triton.language
pytestmark = pytest.mark.interpreter
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = PlanConfig(16, 32, 64, 64)  # the interpreter's own tiles, but splits that small cases reach


PLAIN = [case for case in testing.CASES if case.name in testing.SHAPES]


@pytest.mark.parametrize(
    "case, dtype",
    [(case, dtype) for dtype in DTYPES for case in (PLAIN if dtype == torch.float16 else testing.CASES)],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_cases(case, dtype):
    inputs = testing.make_inputs(case, dtype)
    testing.check(inputs, *inputs.attention("triton"))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("features", [{}, testing.FEATURES["everything"]], ids=["plain", "everything"])
@pytest.mark.parametrize("case", testing.QUANTIZED_CASES, ids=lambda c: c.name)
def test_quantized_caches(case, features, dtype):
    case = dataclasses.replace(case, spec=dataclasses.replace(case.spec, **features))
    inputs = testing.make_inputs(case, dtype)
    testing.check(inputs, *inputs.attention("triton", config=SMALL))


@pytest.mark.parametrize("features", [{}, *testing.FEATURES.values()], ids=["plain", *testing.FEATURES])
@pytest.mark.parametrize("shape", testing.SPLIT_SHAPES.values(), ids=testing.SPLIT_SHAPES)
def test_splits_merge_to_the_whole(shape, features):
    inputs = testing.make_inputs(Case("split", shape, make_spec(**features)), torch.float32)
    plan = inputs.plan("triton", config=SMALL)
    assert plan.num_merges > 0 or "window_left" in features
    out, lse = sk.attention(inputs.q, inputs.k_cache, inputs.v_cache, plan, return_lse=True, **inputs.kwargs)
    testing.check(inputs, out, lse)
    assert not plan.counters.any(), "arrivals and queue must be zero again after the call"


@pytest.mark.parametrize("page_size", [1, 5, 32, 64])
@pytest.mark.parametrize("tree", [False, True], ids=["", "tree"])
def test_pages_across_splits(page_size, tree):
    case = Case("pages", ((8, 70), (2, 129), (1, 131), (37, 100)), make_spec((6, 2), 80, page_size=page_size), tree=tree)
    inputs = testing.make_inputs(case, torch.float16)
    testing.check(inputs, *inputs.attention("triton", config=SMALL))


def select(inputs, order):
    """The same requests in another order, or fewer of them, over the same cache."""
    bounds = inputs.cu_seqlens_q.tolist()
    rows = [torch.arange(bounds[i], bounds[i + 1]) for i in order]
    lens = torch.tensor([0] + [len(r) for r in rows]).cumsum(0).to(torch.int32)
    picked = inputs._replace(
        q=inputs.q[torch.cat(rows)], cu_seqlens_q=lens, seqused_k=inputs.seqused_k[order], block_table=inputs.block_table[order]
    )
    return picked, torch.cat(rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_neighbours(dtype):
    case = Case("mixed", ((1, 200), (33, 130), (1, 64), (1, 65), (4, 70), (10, 90)), make_spec((6, 2)))
    inputs = testing.make_inputs(case, dtype)
    out, lse = inputs.attention("triton", config=SMALL)
    for order in ([0], [1], [4], [5, 4, 3, 2, 1, 0], [2, 3, 0]):
        picked, rows = select(inputs, order)
        other_out, other_lse = picked.attention("triton", config=SMALL)
        assert torch.equal(other_out, out[rows]) and torch.equal(other_lse, lse[rows]), f"requests {order} changed"


def test_bits_beside_a_chunk_of_nine_or_ten():
    rows = []
    for chunk in (9, 10):
        inputs = testing.make_inputs(Case("chunk", ((1, 200), (10, 90), (1, 33)), make_spec()), torch.bfloat16)
        bounds = torch.tensor([0, 1, 1 + chunk, 2 + chunk], dtype=torch.int32)
        keep = [0, *range(1, 1 + chunk), 11]
        inputs = inputs._replace(q=inputs.q[keep], cu_seqlens_q=bounds)
        out, lse = inputs.attention("triton", config=SMALL)
        rows.append((out[[0, -1]], lse[[0, -1]]))
    assert torch.equal(rows[0][0], rows[1][0]) and torch.equal(rows[0][1], rows[1][1])


@pytest.mark.parametrize("seed", range(3))
def test_bits_do_not_depend_on_who_comes_first(seed):
    """Any order of the items within their class: the queue's order, and so which split arrives last, must not show."""
    inputs = testing.make_inputs(Case("mixed", testing.SPLIT_SHAPES["long_hybrid"], make_spec()), torch.float32)
    plan = inputs.plan("triton", config=SMALL)
    out, lse = sk.attention(inputs.q, inputs.k_cache, inputs.v_cache, plan, return_lse=True)
    split, generator = plan.num_prefill_items, torch.Generator().manual_seed(seed)
    order = torch.cat((torch.randperm(split, generator=generator), split + torch.randperm(plan.num_items - split, generator=generator)))
    shuffled = dataclasses.replace(plan, work_items=plan.work_items[order].contiguous())
    assert not torch.equal(shuffled.work_items, plan.work_items)
    other_out, other_lse = sk.attention(inputs.q, inputs.k_cache, inputs.v_cache, shuffled, return_lse=True)
    assert torch.equal(other_out, out) and torch.equal(other_lse, lse)


@triton.jit
def draw_kernel(visits, prefill, prefill_visits, decode_visits):
    from sarathi_kernels.backends.triton_hybrid import visit_of_ticket

    ticket = tl.program_id(0)
    visit, prefill_tile = visit_of_ticket(ticket, prefill_visits, decode_visits)
    tl.store(visits + ticket, visit)
    tl.store(prefill + ticket, prefill_tile)


@pytest.mark.parametrize("prefills, decodes", [(0, 7), (7, 0), (1, 1), (1, 100), (100, 3), (64, 500)])
def test_queue_visits_everything_once_and_in_proportion(prefills, decodes):
    n = prefills + decodes
    visits, prefill = torch.full((n,), -1, dtype=torch.int32), torch.zeros(n, dtype=torch.int32)
    draw_kernel[(n,)](visits, prefill, prefills, decodes)
    assert sorted(visits.tolist()) == list(range(n))
    assert torch.equal(prefill.bool(), visits < prefills)
    for part in (visits[visits < prefills], visits[visits >= prefills]):  # each cursor moves forward: longest first
        assert torch.equal(part, part.sort().values)
    spread = n - decodes // 4
    taken = prefill.cumsum(0)[:spread]
    expected = torch.arange(1, spread + 1) * prefills / spread
    assert ((taken - expected).abs() <= 1).all(), "prefill tiles must come evenly spread"
    assert not prefill[spread:].any(), "the last decodes are a reserve behind all prefill tiles"


def test_strided_q_out_and_caches():
    inputs = testing.make_inputs(Case("hybrid", testing.SHAPES["hybrid"], make_spec()), torch.float32)
    out, lse = inputs.attention("triton")

    def spread(tensor, *axes):
        shape = list(tensor.shape)
        for axis in axes:
            shape[axis] = shape[axis] * 2 + 1
        wide = torch.full(shape, torch.nan, dtype=tensor.dtype)
        view = wide[tuple(slice(1, 1 + 2 * n, 2) if axis in axes else slice(None) for axis, n in enumerate(tensor.shape))]
        view.copy_(tensor)
        return view

    q, k_cache, v_cache = spread(inputs.q, 0, 1), spread(inputs.k_cache, 0, 1), spread(inputs.v_cache, 2)
    other = spread(torch.empty_like(out), 0)
    _, other_lse = sk.attention(q, k_cache, v_cache, inputs.plan("triton"), out=other, return_lse=True)
    assert torch.equal(other, out) and torch.equal(other_lse, lse)


def test_offsets_beyond_32_bits():
    """Pages 2^29 elements apart: only the touched pages of the buffer ever get memory."""
    inputs = testing.make_inputs(Case("far", ((1, 40), (5, 70)), make_spec((4, 2))), torch.float16)
    pages, stride = inputs.k_cache.shape[0], 2**29
    buffer = torch.empty(pages * stride, dtype=torch.float16)
    shape, inner = inputs.k_cache.shape, inputs.k_cache.stride()[1:]
    k_cache = buffer.as_strided(shape, (stride, *inner), 0).copy_(inputs.k_cache)
    v_cache = buffer.as_strided(shape, (stride, *inner), 2**20).copy_(inputs.v_cache)
    assert (pages - 1) * stride > 2**31
    testing.check(inputs, *inputs._replace(k_cache=k_cache, v_cache=v_cache).attention("triton"))


def test_rows_too_far_apart_are_refused():
    inputs = testing.make_inputs(Case("one", ((1, 1),), make_spec((2, 2))), torch.float32)
    q = inputs.q.as_strided(inputs.q.shape, (2**28, 64, 1))
    with pytest.raises(ValueError, match="q's strides .268435456, 64, 1. spread a tile's rows over"):
        sk.attention(q, inputs.k_cache, inputs.v_cache, inputs.plan("triton"))


# The planner on the device.


def tables(plan):
    items, _, merges, _ = plan.counts.tolist()
    return plan.counts, plan.work_items[:items], plan.merge_items[:merges]


def batch_of(requests, columns):
    q_lens, kv_lens = zip(*requests) if requests else ((), ())
    bounds = torch.tensor([0, *q_lens]).cumsum(0).to(torch.int32)
    return bounds, torch.tensor(kv_lens, dtype=torch.int32), torch.zeros(len(requests), columns, dtype=torch.int32)


def assert_same_plan(spec, requests, config, page_columns=400):
    batch = batch_of(requests, page_columns)
    host = sk.plan(spec, *batch, backend="triton", config=config)
    limits = Limits(int(batch[0][-1]), int(batch[1].sum()))
    device = sk.plan(spec, *batch, backend="triton", config=config, limits=limits)
    device.verify()
    for want, got in zip(tables(host), tables(device)):
        assert torch.equal(want, got)


@pytest.mark.parametrize("seed", range(40))
def test_device_plan_is_the_hosts(seed):
    rng = random.Random(seed)
    group = rng.choice([1, 2, 3, 4, 7, 8, 40])
    spec = sk.AttentionSpec(group * 2, 2, 64, causal=rng.random() < 0.7, window_left=rng.choice([-1, -1, 0, 7, 300]))
    config = PlanConfig(rng.choice([16, 64]), rng.choice([32, 128]), rng.choice([64, 100, 512]), rng.choice([64, 1000, 4096]))
    q_lens, kv_lens = [0, 1, 1, 1, 2, 5, rng.randint(0, 300)], [0, 1, 63, 64, 65, rng.randint(0, 6000)]
    requests = [(rng.choice(q_lens), rng.choice(kv_lens)) for _ in range(rng.choice([0, 1, 2, 5, 40, 200]))]
    assert_same_plan(spec, requests, config)


@pytest.mark.parametrize(
    "requests",
    [((146, 146),), ((8190, 7939),), ((2048, 1), (1, 4099)) * 30, ((600, 1),) * 3 + ((5000, 3),), ((2, 235), (1, 13353)), ((1, 1024),) * 1300],
    ids=["prompt", "longer_than_kv", "alternating", "few_keys", "long_decode", "many_requests"],
)  # fmt: skip
def test_device_plan_is_the_hosts_on_published_shapes(requests):
    assert_same_plan(make_spec((8, 2), window_left=-1), requests, PlanConfig(16, 128, 512, 4096), page_columns=900)


def test_one_plan_is_refilled_with_other_mixes():
    """What a captured graph does: the same buffers, other batches; decode-only, prefill-only, longer splits, fewer requests."""
    spec, columns, batch = make_spec((4, 2), page_size=8), 60, 4
    generator = torch.Generator().manual_seed(0)
    caches = [torch.randn(spec.kv_cache_shape(columns * batch), generator=generator) for _ in range(2)]
    table = torch.randperm(columns * batch, generator=generator).to(torch.int32).view(batch, columns)
    bounds, lens = torch.tensor([0, 1, 1, 1, 1], dtype=torch.int32), torch.tensor([3, 0, 0, 0], dtype=torch.int32)
    limits = Limits(total_q=48, kv_tokens=1000)
    plan = sk.plan(spec, bounds, lens, table, backend="triton", config=SMALL, limits=limits)
    for mix in (((1, 20), (1, 480), (1, 65), (1, 3)), ((40, 40), (0, 0)), ((20, 300), (1, 470), (4, 64), (1, 1)), ((1, 64),)):
        used = list(mix) + [(0, 0)] * (batch - len(mix))
        bounds.copy_(torch.tensor([0, *(q for q, _ in used)]).cumsum(0))
        lens.copy_(torch.tensor([k for _, k in used]))
        plan.refill()
        plan.verify()
        host = sk.plan(spec, bounds, lens, table, backend="triton", config=SMALL)
        for want, got in zip(tables(host), tables(plan)):
            assert torch.equal(want, got)
        q = torch.randn(48, 4, 64, generator=generator)
        out, lse = sk.attention(q, *caches, plan, return_lse=True)
        want, want_lse = sk.attention(q[: host.total_q], *caches, host, return_lse=True)
        assert torch.equal(out[: host.total_q], want) and torch.equal(lse[: host.total_q], want_lse)
        assert not plan.counters.any()


def test_a_batch_beyond_the_limits_gives_nan_and_says_so():
    spec = make_spec((4, 2))
    bounds, lens, table = batch_of(((1, 700), (1, 30)), 50)
    plan = sk.plan(spec, bounds, lens, table, backend="triton", config=SMALL, limits=Limits(2, kv_tokens=100))
    with pytest.raises(ValueError, match="beyond the plan's limits.*keys .700, 30."):
        plan.verify()
    cache = torch.zeros(spec.kv_cache_shape(1))
    out, lse = sk.attention(torch.zeros(2, 4, 64), cache, cache, plan, return_lse=True)
    assert out.isnan().all() and lse.isnan().all()
    lens.copy_(torch.tensor([60, 30], dtype=torch.int32))
    plan.refill()
    plan.verify()
    assert (sk.attention(torch.zeros(2, 4, 64), cache, cache, plan) == 0).all()


def test_a_plan_of_the_host_is_not_refilled():
    spec = make_spec((4, 2))
    batch = batch_of(((1, 7),), 1)
    with pytest.raises(ValueError, match="made on the host"):
        sk.plan(spec, *batch, backend="triton").refill()
    with pytest.raises(ValueError, match="'reference' has no planner on the device"):
        sk.plan(spec, *batch, backend="reference", limits=Limits(1))


# The cache, and merging.


QUANTIZED = [(dtype, kv_dtype) for dtype in DTYPES[1:] for kv_dtype in (torch.int8, torch.float8_e4m3fn)]


@pytest.mark.parametrize("dtype, kv_dtype", [(dtype, None) for dtype in DTYPES] + QUANTIZED, ids=str)
@pytest.mark.parametrize("head_dim, rotary_dim", [(64, 0), (64, 64), (80, 80), (80, 32), (96, 20), (256, 256)])
@pytest.mark.parametrize("heads", [(9, 3), (40, 20)], ids=str)
def test_append_kv(heads, head_dim, rotary_dim, dtype, kv_dtype):
    spec = sk.AttentionSpec(*heads, head_dim, page_size=5, dtype=dtype, kv_dtype=kv_dtype)
    n, pages, generator = 7, 3, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, h, head_dim, generator=generator).to(dtype) for h in (heads[0], heads[1], heads[1]))
    k[2] = 0
    slots = torch.randperm(pages * 5, generator=generator)[:n]
    slots[4] = -1
    angles = torch.rand(50, max(rotary_dim // 2, 1), generator=generator) * 6
    rotary = {}
    if rotary_dim:
        positions = torch.randint(0, 50, (n,), dtype=torch.int32, generator=generator)
        rotary = dict(positions=positions, cos_sin=torch.cat((angles.cos(), angles.sin()), 1))

    def run(backend):
        caches = [torch.zeros(spec.kv_cache_shape(pages)).to(spec.kv_dtype) for _ in range(2)]
        scales, mine = {}, q.clone()
        if kv_dtype is not None:
            scales = {name: torch.full(spec.kv_scale_shape(pages), 0.01) for name in ("k_scale", "v_scale")}
        sk.append_kv(spec, k, v, *caches, slots, q=mine if rotary else None, **rotary, **scales, backend=backend)
        return [x.double() for x in (*caches, mine, *scales.values())]

    # One unit in the last place of what is stored: the oracle rounds once from float64. (The interpreter cuts bfloat16 off.)
    relative = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
    names = ("k_cache", "v_cache", "q", "k_scale", "v_scale")
    for name, want, got in zip(names, run("reference"), run("triton")):
        if "cache" in name and kv_dtype == torch.int8:
            assert (want - got).abs().max() <= 1 and (want != got).double().mean() < 0.01, name
        elif "cache" in name and kv_dtype is not None:  # float32 on the way: another side of a rounding boundary now and then
            assert ((want - got).abs() <= want.abs().clamp(min=2**-6) / 8).all() and (want != got).double().mean() < 0.002, name
        else:
            bound = relative[dtype if "scale" not in name else torch.float32] * want.abs().clamp(min=1)
            assert ((want - got).abs() <= bound).all(), name


@triton.jit
def fp8_kernel(codes, values, floats, stored):
    from sarathi_kernels.backends.triton_cache import float_to_fp8_e4m3
    from sarathi_kernels.backends.triton_hybrid import fp8_e4m3_to_float16

    i = tl.program_id(0) * 256 + tl.arange(0, 256)
    tl.store(values + i, fp8_e4m3_to_float16(tl.load(codes + i)).to(tl.float32))
    tl.store(stored + i, float_to_fp8_e4m3(tl.load(floats + i)))


def test_fp8_conversions_are_exact():
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).repeat(40)
    exact = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()
    neighbours = exact[:126].unfold(0, 2, 1)
    ties = neighbours.mean(1)
    around = torch.cat([t * s for t in (ties, ties * (1 + 2**-20), ties * (1 - 2**-20)) for s in (1, -1)])
    floats = torch.cat((exact, around, torch.tensor([1e9, -1e9, 448.0, 460.0, 1e-9, 0.0, -0.0, torch.inf, torch.nan]), torch.randn(8000) * 20))
    floats = torch.cat((floats, torch.zeros(len(codes) - len(floats))))
    values, stored = torch.zeros(len(codes)), torch.zeros(len(codes), dtype=torch.uint8)
    fp8_kernel[(len(codes) // 256,)](codes, values, floats, stored)
    assert torch.equal(values[:256].nan_to_num(1e9), exact.nan_to_num(1e9))
    want = floats.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(stored | 0x80 * floats.isnan(), want | 0x80 * floats.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_states", [1, 3, 17])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_merge_states(head_dim, num_states, dtype):
    generator = torch.Generator().manual_seed(num_states)
    outs = torch.randn(num_states, 7, 3, head_dim, generator=generator).to(dtype)
    lses = torch.randn(num_states, 7, 3, generator=generator) * 5
    lses[0, 2], lses[:, 3] = -torch.inf, -torch.inf
    outs[0, 2], outs[:, 3] = torch.nan, torch.nan
    out, lse = sk.merge_states(outs, lses, backend="triton")
    want, want_lse = sk.merge_states(outs.double(), lses, backend="reference")
    assert (out[3] == 0).all() and torch.isneginf(lse[3]).all()
    keep = torch.isfinite(want_lse)
    relative = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert ((out.double() - want).abs() <= relative * want.abs().clamp(min=1))[keep].all()
    assert ((lse - want_lse).abs() <= 1e-5)[keep].all()
    if num_states == 1:
        assert not out[2].any()


def test_a_plan_with_nothing_to_do():
    inputs = testing.make_inputs(Case("nothing", ((0, 20), (0, 0)), make_spec()), torch.float32)
    out, lse = inputs.attention("triton")
    assert out.shape == (0, 8, 64) and lse.shape == (0, 8)
