"""The native CPU kernels against the float64 oracle: every instruction set this machine can run, every dtype, every feature."""

import pytest
import torch

import sarathi_kernels as sk
from sarathi_kernels import testing
from sarathi_kernels.backends import PlanConfig, cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QUANTIZED = [case for case in testing.QUANTIZED_CASES if case.spec.kv_dtype == torch.int8]


# The AMX kernels' own source, its tile instructions compiled to plain loops: runs where AMX is missing, and is never chosen by itself.
EMULATED = "amx_emulated"


@pytest.fixture(params=[*cpu.isas(), EMULATED])
def isa(request):
    before = cpu.isa()
    if request.param == EMULATED and "avx512bf16" not in cpu.isas():
        pytest.skip("all but the tiles of the emulated AMX kernels needs AVX512_BF16")
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


def run(case, dtype, **options):
    inputs = testing.make_inputs(case, dtype)
    out, lse = inputs.attention("cpu", **options)
    testing.check(inputs, out, lse)
    return out, lse


@pytest.mark.parametrize("case", testing.CASES + QUANTIZED, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_oracle(case, dtype, isa):
    run(case, dtype)


@pytest.mark.parametrize("shape", testing.SPLIT_SHAPES.values(), ids=testing.SPLIT_SHAPES)
@pytest.mark.parametrize("features", [{}, *testing.FEATURES.values()], ids=["plain", *testing.FEATURES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_splits_merge_to_the_whole(shape, features, dtype, isa):
    run(testing.Case("split", shape, testing.make_spec(**features)), dtype, config=PlanConfig(8, 96, 64, 100))


# Decodes of long context and prefills of long context at native speed, on the instruction set users get.
@pytest.mark.parametrize("case", testing.LARGE_CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large(case, dtype):
    if case.pairs > 60e6:
        case = testing.Case(case.name, case.requests[-3:], case.spec)  # the oracle's time, not ours
    run(case, dtype)


@pytest.mark.parametrize("dim", [8, 24, 40, 72, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_head_dim(dim, dtype, isa):
    run(testing.Case("dim", testing.SHAPES["hybrid"], testing.make_spec((4, 2), dim)), dtype)


@pytest.mark.parametrize("features", testing.FEATURES.values(), ids=testing.FEATURES)
def test_int8_with_features(features, isa):
    run(testing.Case("int8", testing.SPLIT_SHAPES["long_hybrid"], testing.make_spec(kv_dtype=torch.int8, **features)), torch.bfloat16)


@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_scale_that_is_not_positive(scale, isa):
    run(testing.Case("scale", testing.SHAPES["hybrid"], testing.make_spec(softmax_scale=scale)), torch.float32)


def test_bits_do_not_depend_on_threads_or_neighbours(isa):
    requests = ((1, 1500), (40, 700), (1, 33), (3, 2100))
    inputs = testing.make_inputs(testing.Case("together", requests, testing.make_spec()), torch.bfloat16)
    threads = torch.get_num_threads()
    config = PlanConfig(8, 96, 256, 512)
    together = inputs.attention("cpu", config=config)
    try:
        torch.set_num_threads(1)
        for got, want in zip(inputs.attention("cpu", config=config), together):
            assert torch.equal(got, want)
        begin = 0
        for i, (q_len, _) in enumerate(requests):
            alone = inputs._replace(
                q=inputs.q[begin : begin + q_len],
                cu_seqlens_q=torch.tensor([0, q_len], dtype=torch.int32),
                seqused_k=inputs.seqused_k[i : i + 1],
                block_table=inputs.block_table[i : i + 1],
            )
            for got, want in zip(alone.attention("cpu", config=config), together):
                assert torch.equal(got, want[begin : begin + q_len]), f"request {i} depends on its neighbours"
            begin += q_len
    finally:
        torch.set_num_threads(threads)


def test_strided_query_cache_and_output(isa):
    inputs = testing.make_inputs(testing.Case("strided", testing.SHAPES["hybrid"], testing.make_spec()), torch.float32)
    q = torch.full((inputs.q.shape[0], 3 * inputs.q.shape[1], inputs.q.shape[2]), torch.nan)
    q[:, 4:12] = inputs.q
    both = torch.stack((inputs.k_cache, inputs.v_cache), dim=2)  # one allocation: K and V of a slot side by side
    out = torch.full_like(q, torch.nan)
    plan = inputs.plan("cpu")
    sk.attention(q[:, 4:12], both[:, :, 0], both[:, :, 1], plan, out=out[:, 4:12])
    testing.check(inputs, out[:, 4:12], None)
    assert out[:, :4].isnan().all() and out[:, 12:].isnan().all()


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_empty_kv_cache_is_writable_memory_of_its_own_on_huge_page_boundaries(kv_dtype):
    spec = sk.AttentionSpec(8, 2, 64, dtype=torch.bfloat16, kv_dtype=kv_dtype)
    k_cache, v_cache = sk.empty_kv_cache(spec, 2000)
    for value, cache in ((1, k_cache), (2, v_cache)):
        assert cache.shape == spec.kv_cache_shape(2000) and cache.dtype == kv_dtype and cache.is_contiguous()
        assert cache.data_ptr() % (2 << 20) == 0
        cache.fill_(value)
    assert (k_cache == 1).all() and (v_cache == 2).all()


@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=["same", "int8"])
@pytest.mark.parametrize("rotary_dim", [0, 16, 40, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_append_kv(dtype, rotary_dim, kv_dtype, isa):
    spec = sk.AttentionSpec(6, 3, 64, page_size=5, dtype=dtype, kv_dtype=kv_dtype)
    generator = torch.Generator().manual_seed(0)
    tokens, pages = 23, 9
    k, v, q = (torch.randn(tokens, 6, heads, 64, generator=generator).to(dtype)[:, 2] for heads in (3, 3, 6))  # strided
    slots = torch.randperm(pages * spec.page_size, generator=generator)[:tokens]
    slots[4] = -1
    rope = {}
    if rotary_dim:
        positions = torch.randint(0, 1000, (tokens,), generator=generator, dtype=torch.int32)
        angle = torch.arange(1000)[:, None] * 1e4 ** -(torch.arange(rotary_dim // 2) / (rotary_dim // 2))
        rope = {"positions": positions, "cos_sin": torch.cat((angle.cos(), angle.sin()), 1).contiguous()}
    results = []
    for backend in ("cpu", "reference"):
        caches = [torch.full(spec.kv_cache_shape(pages), 7).to(spec.kv_dtype) for _ in range(2)]
        scales = {name: torch.full(spec.kv_scale_shape(pages), 7.0) for name in ("k_scale", "v_scale")} if kv_dtype else {}
        rotated = q.clone() if rotary_dim else None
        sk.append_kv(spec, k, v, *caches, slots, q=rotated, backend=backend, **rope, **scales)
        results.append((*caches, *scales.values(), *([rotated] if rotary_dim else [])))
    for i, (got, want) in enumerate(zip(*results)):
        if got.dtype == torch.int8:
            assert (got.int() - want.int()).abs().max() <= 1  # a value half way between two steps
            continue
        # One rounding to the dtype of a float32 result; the oracle's was of a float64 one.
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 1 / 128, torch.float16: 1 / 1024}[got.dtype]
        torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-5, msg=lambda m: f"result {i}: {m}")


def test_int8_error_of_the_cache():
    """The int8 cache against the same cache in float32: what quantisation costs, measured (out rms is about 0.1)."""
    spec8 = testing.make_spec(kv_dtype=torch.int8)
    tokens = 600
    generator = torch.Generator().manual_seed(1)
    k, v, q = (torch.randn(tokens, heads, 64, generator=generator) for heads in (2, 2, 8))
    table = torch.arange(-(-tokens // 16), dtype=torch.int32)[None]
    batch = (torch.tensor([0, tokens], dtype=torch.int32), torch.tensor([tokens], dtype=torch.int32), table)
    outs = []
    for spec in (spec8, testing.make_spec()):
        caches = [torch.zeros(spec.kv_cache_shape(table.shape[1]), dtype=spec.kv_dtype) for _ in range(2)]
        shape = spec.kv_scale_shape(table.shape[1])
        scales = {name: torch.zeros(shape) for name in ("k_scale", "v_scale")} if shape else {}
        sk.append_kv(spec, k, v, *caches, torch.arange(tokens), backend="cpu", **scales)
        outs.append(sk.attention(q, *caches, sk.plan(spec, *batch, backend="cpu"), **scales))
    error = (outs[0] - outs[1])[100:]
    assert error.square().mean().sqrt() < 0.02 * outs[1][100:].square().mean().sqrt()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_states(dtype, isa):
    generator = torch.Generator().manual_seed(0)
    outs = torch.randn(3, 50, 4, 40, generator=generator).to(dtype)
    lses = 3 * torch.randn(3, 50, 4, generator=generator)
    lses[0, 10:20] = lses[:, 30:33] = -torch.inf
    outs[0, 10:20] = torch.nan  # a state that saw no key may hold anything
    out, lse = sk.merge_states(outs, lses, backend="cpu")
    want, want_lse = sk.merge_states(outs.double(), lses, backend="reference")
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1 / 256, torch.float16: 1 / 2048}[dtype]
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=1e-6)
