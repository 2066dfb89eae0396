"""The Triton backend on a GPU: values, bits on hardware, and one captured graph that replays other mixes."""

import dataclasses

import pytest
import torch

import sarathi_kernels as sk
from sarathi_kernels import backends, testing
from sarathi_kernels.backends import Problem
from sarathi_kernels.plan import Limits
from sarathi_kernels.testing import Case, make_spec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REASON = "no CUDA device" if not torch.cuda.is_available() else backends.get("triton").supports(Problem(make_spec(), torch.device("cuda")))
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"the Triton backend cannot run here: {REASON}")


def short_splits(spec):
    return backends.get("triton").plan_config(spec)._replace(decode_split=128, prefill_split=128)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", testing.CASES + testing.LARGE_CASES, ids=lambda c: c.name)
def test_cases(case, dtype):
    inputs = testing.make_inputs(case, dtype, device="cuda")
    testing.check(inputs, *inputs.attention("triton"))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("case", testing.QUANTIZED_CASES, ids=lambda c: c.name)
def test_quantized_caches(case, head_dim, dtype):
    case = dataclasses.replace(case, spec=dataclasses.replace(case.spec, head_dim=head_dim, softmax_scale=None))
    inputs = testing.make_inputs(case, dtype, device="cuda")
    testing.check(inputs, *inputs.attention("triton"))


@pytest.mark.parametrize("features", [{}, *testing.FEATURES.values()], ids=["plain", *testing.FEATURES])
@pytest.mark.parametrize("shape", testing.SPLIT_SHAPES.values(), ids=testing.SPLIT_SHAPES)
def test_splits_merge_to_the_whole(shape, features):
    inputs = testing.make_inputs(Case("split", shape, make_spec((8, 2), 128, **features)), torch.bfloat16, device="cuda")
    plan = inputs.plan("triton", config=short_splits(inputs.spec))
    out, lse = sk.attention(inputs.q, inputs.k_cache, inputs.v_cache, plan, return_lse=True, **inputs.kwargs)
    testing.check(inputs, out, lse)
    assert not plan.counters.any()


def test_bits_do_not_depend_on_neighbours_or_time():
    requests = ((1, 5000), (300, 2000), (1, 64), (1, 700), (4, 1300), (10, 900)) + ((1, 1500),) * 60
    inputs = testing.make_inputs(Case("mixed", requests, make_spec((32, 8), 128)), torch.bfloat16, device="cuda")
    out, lse = inputs.attention("triton")
    for _ in range(100):
        again, again_lse = inputs.attention("triton")
        assert torch.equal(again, out) and torch.equal(again_lse, lse)
    bounds = inputs.cu_seqlens_q.tolist()
    for order in ([0], [1], [4], list(range(65, -1, -1)), [1, 0, 30]):
        rows = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in order]).cuda()
        lens = torch.tensor([0] + [bounds[i + 1] - bounds[i] for i in order]).cumsum(0).to(torch.int32).cuda()
        picked = inputs._replace(q=inputs.q[rows], cu_seqlens_q=lens, seqused_k=inputs.seqused_k[order], block_table=inputs.block_table[order])
        other, other_lse = picked.attention("triton")
        assert torch.equal(other, out[rows]) and torch.equal(other_lse, lse[rows])


def test_one_captured_graph_replays_other_mixes():
    spec, columns, batch = make_spec((8, 2), 128, page_size=16, dtype=torch.bfloat16), 512, 32
    generator = torch.Generator().manual_seed(0)
    caches = [torch.randn(spec.kv_cache_shape(columns * 4), generator=generator).to("cuda", spec.dtype) for _ in range(2)]
    table = torch.randint(columns * 4, (batch, columns), generator=generator).to("cuda", torch.int32)
    q = torch.randn(640, 8, 128, generator=generator).to("cuda", spec.dtype)
    bounds, lens = torch.zeros(batch + 1, dtype=torch.int32, device="cuda"), torch.zeros(batch, dtype=torch.int32, device="cuda")
    bounds[1:], lens[0] = 1, 17
    plan = sk.plan(spec, bounds, lens, table, backend="triton", limits=Limits(640))
    out = torch.zeros_like(q)
    sk.attention(q, *caches, plan, out=out)  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.refill()
        for _ in range(2):  # two layers share the plan
            sk.attention(q, *caches, plan, out=out)
    mixes = {
        "decodes": ((1, 100),) * 32,
        "prompt": ((600, 600),),
        "longer splits than at capture": ((1, 8000),) * 3 + ((500, 7000),),
        "hybrid": ((256, 4000),) + ((1, 2000),) * 31,
    }
    for name, mix in mixes.items():
        used = list(mix) + [(0, 0)] * (batch - len(mix))
        bounds.copy_(torch.tensor([0, *(n for n, _ in used)]).cumsum(0))
        lens.copy_(torch.tensor([k for _, k in used]))
        graph.replay()
        plan.verify()
        want = sk.attention(q[: int(bounds[-1])], *caches, sk.plan(spec, bounds, lens, table, backend="triton"))
        assert torch.equal(out[: len(want)], want), name


@pytest.mark.parametrize("kv_dtype", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("head_dim, rotary_dim", [(64, 64), (80, 32), (128, 128), (256, 0)])
def test_append_kv(head_dim, rotary_dim, kv_dtype):
    spec = sk.AttentionSpec(9, 3, head_dim, page_size=5, dtype=torch.float16, kv_dtype=kv_dtype)
    n, pages, generator = 40, 10, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, h, head_dim, generator=generator).half() for h in (9, 3, 3))
    slots, rotary = torch.randperm(pages * 5, generator=generator)[:n], {}
    if rotary_dim:
        angles = torch.rand(50, rotary_dim // 2, generator=generator) * 6
        positions = torch.randint(0, 50, (n,), dtype=torch.int32, generator=generator)
        rotary = dict(positions=positions, cos_sin=torch.cat((angles.cos(), angles.sin()), 1))

    def run(backend, device):
        caches = [torch.zeros(spec.kv_cache_shape(pages), device=device).to(spec.kv_dtype) for _ in range(2)]
        shape = spec.kv_scale_shape(pages)
        scales = {} if shape is None else {s: torch.full(shape, 0.01, device=device) for s in ("k_scale", "v_scale")}
        mine = q.clone().to(device)
        extra = {name: tensor.to(device) for name, tensor in rotary.items()} | ({"q": mine} if rotary else {})
        sk.append_kv(spec, k.to(device), v.to(device), *caches, slots.to(device), **extra, **scales, backend=backend)
        return [x.cpu().double() for x in (*caches, mine, *scales.values())]

    for want, got in zip(run("reference", "cpu"), run("triton", "cuda")):
        step = 1 if kv_dtype == torch.int8 else want.abs().clamp(min=2**-6) * (2**-10 if kv_dtype is None else 2**-3)
        assert ((want - got).abs() <= step).all() and (want != got).double().mean() < 0.01


def test_merge_states():
    generator = torch.Generator().manual_seed(0)
    outs, lses = torch.randn(5, 70, 3, 80, generator=generator), torch.randn(5, 70, 3, generator=generator)
    lses[1, 2], lses[:, 3] = -torch.inf, -torch.inf
    out, lse = sk.merge_states(outs.cuda(), lses.cuda(), backend="triton")
    want, want_lse = sk.merge_states(outs, lses, backend="reference")
    assert torch.allclose(out.cpu(), want, atol=1e-5) and torch.allclose(lse.cpu(), want_lse, atol=1e-5)
