"""The CUDA backend on a GPU, beyond tests/test_gpu.py: the device planner, one captured graph that replays other mixes, streams."""

import pytest
import torch

import sarathi_kernels as sk
from sarathi_kernels import backends, testing
from sarathi_kernels.backends import Problem, cuda
from sarathi_kernels.plan import Limits
from sarathi_kernels.testing import Case, make_spec

SPEC = make_spec((8, 2), 128, page_size=16, dtype=torch.bfloat16)
REASON = "no CUDA device" if not torch.cuda.is_available() else backends.get("cuda").supports(Problem(SPEC, torch.device("cuda")))
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"the CUDA backend cannot run here: {REASON}")

MIXES = {
    "decodes": ((1, 100),) * 32,
    "prompt": ((600, 600),),
    "longer splits than at capture": ((1, 8000),) * 3 + ((500, 7000),),
    "hybrid": ((256, 4000),) + ((1, 2000),) * 31,
    "nothing": (),
}


class Batch:
    """Tensors that a captured graph reads in place, for up to 32 requests of up to 8,192 keys."""

    def __init__(self):
        columns, generator = 512, torch.Generator().manual_seed(0)
        self.caches = [torch.randn(SPEC.kv_cache_shape(columns * 4), generator=generator).to("cuda", SPEC.dtype) for _ in range(2)]
        self.table = torch.randint(columns * 4, (32, columns), generator=generator).to("cuda", torch.int32)
        self.q = torch.randn(640, 8, 128, generator=generator).to("cuda", SPEC.dtype)
        self.bounds, self.lens = torch.zeros(33, dtype=torch.int32, device="cuda"), torch.zeros(32, dtype=torch.int32, device="cuda")
        self.fill(((1, 17),))

    def fill(self, mix):
        used = [*mix, *[(0, 0)] * (32 - len(mix))]
        self.bounds.copy_(torch.tensor([0, *(n for n, _ in used)]).cumsum(0))
        self.lens.copy_(torch.tensor([k for _, k in used]))


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_the_device_plans_like_the_host(mix):
    batch = Batch()
    device = sk.plan(SPEC, batch.bounds, batch.lens, batch.table, backend="cuda", limits=Limits(640))
    batch.fill(mix)
    device.refill()
    device.verify()
    host = sk.plan(SPEC, batch.bounds, batch.lens, batch.table, backend="cuda")
    assert device.counts.tolist() == host.counts.tolist()
    assert torch.equal(device.work_items[: host.num_items], host.work_items)
    assert torch.equal(device.merge_items[: host.num_merges], host.merge_items)


def test_a_batch_beyond_the_limits_says_so():
    batch = Batch()
    plan = sk.plan(SPEC, batch.bounds, batch.lens, batch.table, backend="cuda", limits=Limits(640, kv_tokens=4096))
    batch.fill(((1, 8000),) * 32)
    plan.refill()
    assert sk.attention(batch.q, *batch.caches, plan).isnan().all()
    with pytest.raises(ValueError, match="beyond the plan's limits"):
        plan.verify()


def test_one_captured_graph_replays_other_mixes():
    batch = Batch()
    plan = sk.plan(SPEC, batch.bounds, batch.lens, batch.table, backend="cuda", limits=Limits(640))
    out = torch.zeros_like(batch.q)
    sk.attention(batch.q, *batch.caches, plan, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.refill()
        for _ in range(2):  # two layers share the plan
            sk.attention(batch.q, *batch.caches, plan, out=out)
    for name, mix in MIXES.items():
        batch.fill(mix)
        graph.replay()
        plan.verify()
        on_host = sk.plan(SPEC, batch.bounds, batch.lens, batch.table, backend="cuda")
        want = sk.attention(batch.q[: on_host.total_q], *batch.caches, on_host)
        assert torch.equal(out[: len(want)], want), name
        assert not plan.counters.any(), name


@pytest.mark.parametrize("features", [{}, *testing.FEATURES.values()], ids=["plain", *testing.FEATURES])
@pytest.mark.parametrize("head_dim", cuda.HEAD_DIMS)
def test_splits_merge_to_the_whole(head_dim, features):
    spec = make_spec((8, 2), **{"head_dim": head_dim, **features})
    inputs = testing.make_inputs(Case("split", testing.SPLIT_SHAPES["long_hybrid"], spec), torch.float16, device="cuda")
    config = cuda.plan_config(inputs.spec)._replace(decode_split=64, prefill_split=128)
    testing.check(inputs, *inputs.attention("cuda", config=config))


def test_streams_may_have_launches_of_their_own():
    """Two plans with scratch of their own, on two streams at once, many times over: what each computes alone."""
    batch = Batch()
    batch.fill(MIXES["hybrid"])
    q = batch.q[: int(batch.bounds[-1])]
    plans = [sk.plan(SPEC, batch.bounds, batch.lens, batch.table, backend="cuda") for _ in range(2)]
    want = sk.attention(q, *batch.caches, plans[0])
    torch.cuda.synchronize()
    outs = [torch.zeros_like(q) for _ in plans]
    streams = [torch.cuda.Stream() for _ in plans]
    for _ in range(20):
        for plan, out, stream in zip(plans, outs, streams):
            with torch.cuda.stream(stream):
                sk.attention(q, *batch.caches, plan, out=out)
    torch.cuda.synchronize()
    assert all(torch.equal(out, want) for out in outs)
