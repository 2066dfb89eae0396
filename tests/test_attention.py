"""The op on every backend that runs on CPU tensors in this process: values, bits, strides, registration, refusals."""

import dataclasses

import pytest
import torch

import sarathi_kernels as sk
from sarathi_kernels import backends, testing
from sarathi_kernels.backends import PlanConfig, Problem
from sarathi_kernels.testing import Case, make_spec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["cpu", "reference"]


def supported(backend, spec):
    reason = backends.get(backend).supports(Problem(spec, torch.device("cpu")))
    return reason is None


def small_split(backend, spec, split=64):
    """The backend's own tiles, but splits short enough that small cases exercise the merge."""
    return backends.get(backend).plan_config(spec)._replace(decode_split=split, prefill_split=split)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", testing.CASES, ids=lambda c: c.name)
def test_cases(case, dtype):
    inputs = testing.make_inputs(case, dtype)
    out, lse = inputs.attention("cpu")
    testing.check(inputs, out, lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", testing.LARGE_CASES, ids=lambda c: c.name)
def test_large_cases(case, dtype):
    inputs = testing.make_inputs(case, dtype)
    out, lse = inputs.attention("cpu")
    testing.check(inputs, out, lse)


@pytest.mark.parametrize("features", [{}, *testing.FEATURES.values()], ids=["plain", *testing.FEATURES])
@pytest.mark.parametrize("shape", testing.SPLIT_SHAPES.values(), ids=testing.SPLIT_SHAPES)
def test_split_over_keys(shape, features):
    inputs = testing.make_inputs(Case("split", shape, make_spec(**features)), torch.float32)
    out, lse = inputs.attention("cpu", config=small_split("cpu", inputs.spec))
    testing.check(inputs, out, lse)


@pytest.mark.parametrize("length", [15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257])
def test_lengths_around_pages_tiles_and_splits(length):
    shape = ((1, length), (length, length), (min(7, length), length), (length, length + 3))
    inputs = testing.make_inputs(Case("edge", shape, make_spec((6, 2), 64)), torch.float32)
    out, lse = inputs.attention("cpu", config=small_split("cpu", inputs.spec))
    testing.check(inputs, out, lse)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_q_out_and_caches(backend):
    """q as a view into a fused qkv projection; K and V interleaved in one buffer, heads before slots."""
    case = Case("strided", testing.SHAPES["hybrid"], make_spec((8, 2), 64))
    inputs = testing.make_inputs(case, torch.float32)
    want, want_lse = inputs.attention(backend)
    total = inputs.q.shape[0]
    qkv = torch.full((total, 12, 64), torch.nan)
    qkv[:, :8] = inputs.q
    both = torch.full((inputs.k_cache.shape[0], 2, 2, 16, 64), torch.nan)
    both[:, 0], both[:, 1] = inputs.k_cache.transpose(1, 2), inputs.v_cache.transpose(1, 2)
    plan = inputs.plan(backend)
    out = torch.full((total, 10, 64), 7.0)
    got, lse = sk.attention(
        qkv[:, :8], both[:, 0].transpose(1, 2), both[:, 1].transpose(1, 2), plan, out=out[:, 1:9], return_lse=True
    )
    assert got.data_ptr() == out[:, 1:9].data_ptr()
    assert torch.equal(got, want) and torch.equal(lse, want_lse)
    assert (out[:, 0] == 7).all() and (out[:, 9] == 7).all(), "wrote outside of out"
    transposed = inputs.q.transpose(0, 2).contiguous().transpose(0, 2)
    assert transposed.stride(-1) != 1
    assert torch.equal(sk.attention(transposed, inputs.k_cache, inputs.v_cache, plan), want)


def rows(inputs, out, i):
    return out[inputs.cu_seqlens_q[i] : inputs.cu_seqlens_q[i + 1]]


def subset(inputs, order):
    """The same requests, over the same caches, in another order or company."""
    q = torch.cat([rows(inputs, inputs.q, i) for i in order])
    lens = [int(inputs.cu_seqlens_q[i + 1] - inputs.cu_seqlens_q[i]) for i in order]
    cu = torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=torch.int32)
    return inputs._replace(q=q, cu_seqlens_q=cu, seqused_k=inputs.seqused_k[order], block_table=inputs.block_table[order])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, head_dim", [((8, 2), 128), ((9, 3), 64)])
def test_a_row_has_the_same_bits_in_any_company(heads, head_dim, dtype):
    shape = ((1, 3000), (200, 900), (1, 70), (9, 300), (1, 1025), (3, 64))
    inputs = testing.make_inputs(Case("bits", shape, make_spec(heads, head_dim)), dtype)
    together, _ = inputs.attention("cpu")
    permuted = [4, 2, 0, 5, 1, 3]
    out, _ = subset(inputs, permuted).attention("cpu")
    for i in range(len(shape)):
        alone, _ = subset(inputs, [i]).attention("cpu")
        assert torch.equal(alone, rows(inputs, together, i)), f"request {i} alone"
        assert torch.equal(rows(subset(inputs, permuted), out, permuted.index(i)), alone), f"request {i} permuted"


def test_a_decode_has_the_same_bits_beside_a_growing_chunk():
    outs = []
    for chunk in (9, 10, 300):
        inputs = testing.make_inputs(Case("neighbour", ((1, 500), (chunk, 400)), make_spec((8, 2), 128)), torch.bfloat16, poison=False)
        first = testing.make_inputs(Case("first", ((1, 500),), make_spec((8, 2), 128)), torch.bfloat16, seed=1, poison=False)
        pages = inputs.block_table[0, :32].long()
        inputs.k_cache[pages] = first.k_cache[first.block_table[0, :32].long()]
        inputs.v_cache[pages] = first.v_cache[first.block_table[0, :32].long()]
        inputs.q[0] = first.q[0]
        outs.append(inputs.attention("cpu")[0][0])
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_run_to_run():
    inputs = testing.make_inputs(testing.LARGE_CASES[4], torch.bfloat16)
    plan = inputs.plan("cpu")
    first = sk.attention(inputs.q, inputs.k_cache, inputs.v_cache, plan)
    for _ in range(20):
        assert torch.equal(sk.attention(inputs.q, inputs.k_cache, inputs.v_cache, plan), first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_through_the_cache_equal_the_whole_prompt(backend):
    """A prompt in chunks, each appended and then attended to, against the prompt at once."""
    spec = make_spec((6, 2), 64, page_size=5)
    generator = torch.Generator().manual_seed(3)
    n = 150
    q, k, v = (torch.randn(n, heads, 64, generator=generator) for heads in (6, 2, 2))
    table = torch.randperm(40, generator=generator).to(torch.int32)[:30].view(1, 30)

    def run(sizes):
        k_cache, v_cache = (torch.full(spec.kv_cache_shape(40), torch.nan) for _ in range(2))
        outs, done = [], 0
        for size in sizes:
            cu, used = torch.tensor([0, size], dtype=torch.int32), torch.tensor([done + size], dtype=torch.int32)
            plan = sk.plan(spec, cu, used, table, backend=backend)
            part = slice(done, done + size)
            sk.append_kv(spec, k[part], v[part], k_cache, v_cache, sk.slot_mapping(plan), backend=backend)
            outs.append(sk.attention(q[part], k_cache, v_cache, plan))
            done += size
        return torch.cat(outs)

    whole = run([n])
    for sizes in ([50, 50, 50], [1, 148, 1], [64, 64, 22], [1] * 5 + [145]):
        assert (run(sizes) - whole).abs().max() < 2e-6


def test_merge_of_two_halves_equals_the_whole():
    """attention over keys [0, 60) and [60, 100), merged, is attention over all."""
    spec = dataclasses.replace(make_spec((8, 2), 64, page_size=20), causal=False)
    inputs = testing.make_inputs(Case("whole", ((7, 100),), spec), torch.float32)
    whole, whole_lse = inputs.attention("cpu")
    parts = []
    for pages, length in ((slice(0, 3), 60), (slice(3, 5), 40)):
        half = inputs._replace(block_table=inputs.block_table[:, pages], seqused_k=torch.tensor([length], dtype=torch.int32))
        parts.append(half.attention("cpu"))
    out, lse = sk.merge_states(torch.stack([o for o, _ in parts]), torch.stack([l for _, l in parts]))
    assert (out - whole).abs().max() < 1e-6 and (lse - whole_lse).abs().max() < 1e-5


def test_opcheck():
    inputs = testing.make_inputs(Case("op", testing.SHAPES["hybrid"], make_spec()), torch.float32)
    plan = inputs.plan("cpu", config=small_split("cpu", inputs.spec))
    assert plan.num_merges > 0
    args = (
        inputs.q, inputs.k_cache, inputs.v_cache, torch.zeros_like(inputs.q), torch.zeros(inputs.q.shape[:2]),
        plan.cu_seqlens_q, plan.seqused_k, plan.block_table, plan.work_items, plan.merge_items, plan.counts,
        plan.partial_out.zero_(), plan.partial_lse.zero_(), plan.counters, None, None, None, None, 0.125, 0.0, True, -1, "cpu",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.sarathi.attention, args)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(compiler):
    inputs = testing.make_inputs(Case("op", testing.SHAPES["hybrid"], make_spec((8, 2), 64)), torch.float32)
    plan = inputs.plan("cpu")

    def layer(q, k_cache, v_cache):
        out, lse = sk.attention(q * 2.0, k_cache, v_cache, plan, return_lse=True)
        return out + 1.0, lse

    want = layer(*inputs[1:4])
    got = torch.compile(layer, fullgraph=True, backend=compiler)(*inputs[1:4])
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_auto_says_what_it_chose_and_never_the_oracle(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    inputs = testing.make_inputs(testing.CASES[0], torch.float32)
    assert inputs.plan("auto").backend == "cpu"
    spec = dataclasses.replace(inputs.spec, dtype=torch.float64, kv_dtype=torch.float64)
    with pytest.raises(ValueError, match="no backend supports this on cpu: .*reference: can, if named"):
        sk.plan(spec, *inputs[4:7])
    monkeypatch.setenv(backends.ENVIRONMENT, "reference")
    assert inputs.plan("auto").backend == "reference"
    with pytest.raises(ValueError, match="unknown backend 'cpuu'"):
        inputs.plan("cpuu")


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:7", "meta"])
def test_every_backend_answers_for_every_device(device):
    reasons = sk.backend_reasons(sk.AttentionSpec(8, 2, 64), device)
    assert set(reasons) == set(backends.NAMES)
    assert reasons["reference"] is None and all(reason is None or len(reason) > 10 for reason in reasons.values())
    assert (reasons["cpu"] is None) == (device == "cpu")


def test_unsupported_head_dim_names_the_backend_that_could():
    spec = sk.AttentionSpec(2, 1, 20)
    tables = (torch.tensor([0, 1], dtype=torch.int32), torch.tensor([1], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32))
    assert not supported("cpu", spec)
    with pytest.raises(ValueError, match="backend 'cpu' cannot: .*head_dim.*20.*Backends that can: reference"):
        sk.plan(spec, *tables, backend="cpu")


GOOD = Case("good", ((3, 20), (1, 40)), make_spec((8, 2), 64))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda i: i._replace(q=i.q[:-1]), r"q must be torch.float32 of shape \(4, 8, 64\) .*, got torch.float32 \(3, 8, 64\)"),
        (lambda i: i._replace(q=i.q.bfloat16()), "q must be torch.float32 .*, got torch.bfloat16"),
        (lambda i: i._replace(k_cache=i.k_cache[..., :32]), r"k_cache must be .*got torch.float32 \(8, 16, 2, 32\)"),
        (lambda i: i._replace(v_cache=i.v_cache[:2]), r"v_cache must be torch.float32 of shape \(8, 16, 2, 64\).*got torch.float32 \(2, 16, 2, 64\)"),
        (lambda i: i._replace(v_cache=i.v_cache.half()), "v_cache must be torch.float32 .*got torch.float16"),
        (lambda i: i._replace(k_cache=i.k_cache[:3], v_cache=i.v_cache[:3]), "the plan uses page [0-9]+, but k_cache has 3 pages"),
        (lambda i: i._replace(kwargs={"sinks": torch.zeros(8)}), "spec.sinks is False, but sinks were given"),
        (lambda i: i._replace(kwargs={"tree_mask": torch.zeros(4)}), r"tree_mask must be int64 of shape \(4,\), got torch.float32"),
        (lambda i: i._replace(kwargs={"k_scale": torch.zeros(2)}), "k_scale was given, but a torch.float32 cache has no scales"),
        (lambda i: i._replace(kwargs={"out": torch.zeros(4, 8, 32)}), "out must be .*got torch.float32"),
        (lambda i: i._replace(q=i.q.to("meta")), "q is on meta, the plan on cpu"),
    ],
    ids=range(11),
)
def test_bad_input_is_refused_by_value(change, message):
    inputs = testing.make_inputs(GOOD, torch.float32, seed=1)
    plan = inputs.plan("cpu")
    changed = change(inputs)
    with pytest.raises(ValueError, match=message):
        sk.attention(changed.q, changed.k_cache, changed.v_cache, plan, **changed.kwargs)


def test_the_empty_batch():
    inputs = testing.make_inputs(Case("none", (), make_spec()), torch.float32)
    out, lse = inputs.attention("cpu")
    assert out.shape == (0, 8, 64) and lse.shape == (0, 8)
