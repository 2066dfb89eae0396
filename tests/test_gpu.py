"""Every op on a real GPU, on every backend that runs there. What the simulator and the interpreter cannot show: the hardware.

`make gpu` runs this file; elsewhere each test says why it is skipped. The ones called `small` also run under compute-sanitizer.
"""

import pytest
import torch

import sarathi_kernels as sk
from sarathi_kernels import backends, testing
from sarathi_kernels.backends import Problem
from sarathi_kernels.testing import Case, make_spec

DEVICE = torch.device("cuda")
BACKENDS = ["cuda", "triton"]
DTYPES = [torch.bfloat16, torch.float16]
SMALL = ("hybrid", "decodes", "tile_edges", "nothing", "longer_than_kv", "speculative")
MODEL_SPECS = {"llama8b": make_spec((32, 8), 128), "smollm2": make_spec((9, 3), 64), "group8": make_spec((8, 1), 128)}


def runnable(backend, spec):
    """Skips with the true reason: no torch with CUDA, no GPU, or what the backend says of this spec."""
    if not torch.cuda.is_available():
        build = "has no CUDA" if torch.version.cuda is None else f"has CUDA {torch.version.cuda}, but there is no GPU"
        pytest.skip(f"this torch ({torch.__version__}) {build}")
    reason = backends.get(backend).supports(Problem(spec, DEVICE))
    if reason is not None:
        pytest.skip(reason)


def on_gpu(backend, case, dtype, seed=0):
    runnable(backend, case.with_dtype(dtype))
    return testing.make_inputs(case, dtype, device="cuda", seed=seed)


def early_splits(backend, spec, keys=64):
    return backends.get(backend).plan_config(spec)._replace(decode_split=keys, prefill_split=keys)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SMALL)
def test_small(name, backend):
    inputs = on_gpu(backend, Case(name, testing.SHAPES[name], make_spec()), torch.bfloat16)
    testing.check(inputs, *inputs.attention(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", testing.SPLIT_SHAPES)
def test_small_splits(shape, backend):
    inputs = on_gpu(backend, Case(shape, testing.SPLIT_SHAPES[shape], make_spec()), torch.bfloat16)
    out, lse = inputs.attention(backend, config=early_splits(backend, inputs.spec))
    testing.check(inputs, out, lse)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
@pytest.mark.parametrize("case", testing.CASES + testing.QUANTIZED_CASES, ids=lambda c: c.name)
def test_cases(case, dtype, backend):
    inputs = on_gpu(backend, case, dtype)
    testing.check(inputs, *inputs.attention(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", testing.LARGE_CASES, ids=lambda c: c.name)
def test_large_cases(case, backend):
    inputs = on_gpu(backend, case, torch.bfloat16)
    testing.check(inputs, *inputs.attention(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", MODEL_SPECS)
def test_a_row_s_bits_depend_on_nothing_but_its_request(model, backend):
    """Alone, in another order, and beside a neighbour that grows by one token: the same bits. And the same bits every time."""
    shape = ((130, 3000), (1, 2500), (9, 700), (1, 5000), (1, 64))
    inputs = on_gpu(backend, Case("neighbours", shape, MODEL_SPECS[model]), torch.bfloat16)
    want, want_lse = inputs.attention(backend)
    for _ in range(10):
        again, again_lse = inputs.attention(backend)
        assert torch.equal(again, want) and torch.equal(again_lse, want_lse)
    bounds = inputs.cu_seqlens_q.tolist()
    for keep in ([0], [1], [3], [4, 3, 2, 1, 0], [3, 1]):
        rows = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in keep]).to(DEVICE)
        lens = torch.tensor([0, *(bounds[i + 1] - bounds[i] for i in keep)])
        some = inputs._replace(
            q=inputs.q[rows], cu_seqlens_q=lens.cumsum(0).to(torch.int32).to(DEVICE),
            seqused_k=inputs.seqused_k[keep], block_table=inputs.block_table[keep],
        )  # fmt: skip
        out, lse = some.attention(backend)
        assert torch.equal(out, want[rows]) and torch.equal(lse, want_lse[rows]), f"requests {keep} alone"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_captured_graph_replays_what_a_call_computes(backend):
    case = Case("graph", ((40, 900), (1, 3000), (1, 17)), make_spec((8, 2), 128))
    inputs = on_gpu(backend, case, torch.bfloat16)
    plan = inputs.plan(backend)
    out = torch.empty_like(inputs.q)
    q = inputs.q.clone()

    def call():
        sk.attention(q, inputs.k_cache, inputs.v_cache, plan, out=out)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for scale in (1.0, -0.5):
        q.copy_(inputs.q * scale)
        graph.replay()
        replayed = out.clone()
        call()
        assert torch.equal(replayed, out) and replayed.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
def test_small_append_kv(rotary, dtype, backend):
    spec = make_spec((8, 2), 64)
    case = Case("append", ((20, 45), (1, 33), (1, 16)), spec)
    inputs = on_gpu(backend, case, dtype)
    plan = inputs.plan(backend)
    slots, positions = sk.slot_mapping(plan), sk.token_positions(plan)
    k, v = (torch.randn(plan.total_q, 2, 64, device=DEVICE).to(dtype) for _ in range(2))
    angle = torch.rand(64, 32, device=DEVICE) * 6
    cos_sin = torch.cat((angle.cos(), angle.sin()), dim=1)
    extra = {"positions": positions, "cos_sin": cos_sin} if rotary else {}
    results = []
    for name in (backend, "reference"):
        caches, q = [inputs.k_cache.clone(), inputs.v_cache.clone()], inputs.q.clone()
        sk.append_kv(inputs.spec, k, v, *caches, slots, backend=name, **extra, **({"q": q} if rotary else {}))
        results.append([*(c.flatten(0, 1)[slots] for c in caches), q])
    for got, want in zip(*results):
        assert (got.double() - want.double()).abs().max() <= (2**-7 * want.double().abs().max() if rotary else 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_states", [1, 2, 17])
def test_small_merge_states(num_states, backend):
    runnable(backend, make_spec(dtype=torch.bfloat16))
    outs = torch.randn(num_states, 6, 3, 64, device=DEVICE).to(torch.bfloat16)
    lses = torch.randn(num_states, 6, 3, device=DEVICE) * 5
    outs[0, 2], lses[0, 2] = torch.nan, -torch.inf
    out, lse = sk.merge_states(outs, lses, backend=backend)
    want, want_lse = sk.merge_states(outs, lses, backend="reference")
    torch.testing.assert_close(out, want, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)

