"""The sm_80 attention kernel's own source in the host simulator, against the oracle, in every order the schedules try."""

import random

import cuda_sim
import pytest
import torch

import sarathi_kernels as sk
from sarathi_kernels.backends import cuda
from sarathi_kernels.testing import CASES, FEATURES, SHAPES, SPLIT_SHAPES, Case, check, make_inputs, make_spec

SUPPORTED = [case for case in CASES if cuda.spec_reason(case.with_dtype(torch.bfloat16)) is None]
SPLIT_CASES = [Case(name, shape, make_spec(head_dim=dim)) for name, shape in SPLIT_SHAPES.items() for dim in cuda.HEAD_DIMS]
SPLIT_CASES += [Case(f"long_hybrid-{name}", SPLIT_SHAPES["long_hybrid"], make_spec(**FEATURES[name])) for name in ("sinks", "everything", "not_causal")]


def split_early(spec, keys=64):
    """The backend's configuration, cut into splits short enough for small cases to have several."""
    return cuda.plan_config(spec)._replace(decode_split=keys, prefill_split=keys)


@pytest.mark.parametrize("seed, completion", cuda_sim.SCHEDULES)
def test_cases(seed, completion):
    """All shared cases under one schedule; dtypes alternate so that each case meets both under every mode."""
    for i, case in enumerate(SUPPORTED):
        inputs = make_inputs(case, cuda.DTYPES[(i + seed) % 2], seed=seed)
        out, lse, _ = cuda_sim.attention(inputs, seed=seed, completion=completion)
        _check(case, inputs, out, lse)


@pytest.mark.parametrize("case", SPLIT_CASES, ids=lambda case: f"{case.name}-{case.spec.head_dim}")
def test_split_and_merged_by_the_last_arriver(case):
    for i, (seed, completion) in enumerate(cuda_sim.SCHEDULES[::4]):
        inputs = make_inputs(case, cuda.DTYPES[i % 2], seed=seed)
        out, lse, _ = cuda_sim.attention(inputs, config=split_early(inputs.spec), seed=seed, completion=completion)
        _check(case, inputs, out, lse)


def _check(case, inputs, out, lse):
    try:
        check(inputs, out, lse)
    except AssertionError as error:
        raise AssertionError(f"{case.name}, {inputs.spec.dtype}: {error}") from None


def test_row_bits_do_not_depend_on_the_company():
    """Alone, in a batch, in another order, with a longer neighbour, on another number of CTAs: the same bits, splits included."""
    spec = make_spec((8, 2), 64)
    requests = [(1, 300), (20, 200), (1, 37), (33, 90), (4, 65)]
    whole = make_inputs(Case("all", tuple(requests), spec), torch.bfloat16)
    expected = _rows(whole, range(len(requests)))
    rng = random.Random(0)
    for trial in range(6):
        order = rng.sample(range(len(requests)), rng.randint(1, len(requests)))
        got = _rows(whole, order, seed=trial, num_blocks=rng.randint(1, 7), completion="random")
        for i in order:
            for a, b in zip(got[i], expected[i]):
                assert torch.equal(a, b), f"request {i} of {order} differs from the one in the whole batch"


def _rows(inputs, order, **settings):
    """{request: (out, lse)} of a batch made of some of the requests of `inputs`, in the given order."""
    cu = inputs.cu_seqlens_q.tolist()
    parts = {i: slice(cu[i], cu[i + 1]) for i in order}
    lens = [cu[i + 1] - cu[i] for i in order]
    batch = inputs._replace(
        q=torch.cat([inputs.q[parts[i]] for i in order]),
        cu_seqlens_q=torch.tensor([0, *torch.tensor(lens).cumsum(0)], dtype=torch.int32),
        seqused_k=inputs.seqused_k[list(order)],
        block_table=inputs.block_table[list(order)],
    )
    out, lse, _ = cuda_sim.attention(batch, config=split_early(inputs.spec), **settings)
    rows = {}
    for i, o, l in zip(order, out.split(lens), lse.split(lens)):
        rows[i] = (o, l)
    return rows


@pytest.mark.parametrize("dim", cuda.HEAD_DIMS)
def test_scores_that_outgrow_their_reference(dim):
    """Keys that grow along the context: the reference maximum must move, often by more than its slack, and sometimes not."""
    for growth in (1.5, 20.0):
        inputs = make_inputs(Case("growing", ((33, 400), (1, 500)), make_spec(head_dim=dim)), torch.float16)
        for i, kv_len in enumerate(inputs.seqused_k.tolist()):
            position = torch.arange(kv_len)
            page, slot = inputs.block_table[i][position // 16].long(), position % 16
            inputs.k_cache[page, slot] *= (growth * position / kv_len).to(torch.float16)[:, None, None]
        out, lse, _ = cuda_sim.attention(inputs, config=split_early(inputs.spec, 256), seed=1)
        check(inputs, out, lse)


def test_strided_q_out_and_caches():
    """Heads interleaved with other tensors' heads, as slices of one projection, and pages with gaps: only rows are dense."""
    inputs = make_inputs(Case("strided", SHAPES["hybrid"], make_spec()), torch.float16)
    total, heads, dim = inputs.q.shape
    fused = torch.full((total, heads + 5, dim), torch.nan, dtype=torch.float16)
    fused[:, 2 : 2 + heads] = inputs.q
    caches = []
    for cache in (inputs.k_cache, inputs.v_cache):
        roomy = torch.full((cache.shape[0], cache.shape[1] + 1, cache.shape[2] + 3, dim), torch.nan, dtype=torch.float16)
        roomy[:, : cache.shape[1], 1 : 1 + cache.shape[2]] = cache
        caches.append(roomy[:, : cache.shape[1], 1 : 1 + cache.shape[2]])
    out = torch.full((total, heads + 1, dim), 7.0, dtype=torch.float16)
    strided = inputs._replace(q=fused[:, 2 : 2 + heads], k_cache=caches[0], v_cache=caches[1])
    _, lse, _ = cuda_sim.attention(strided, out=out[:, :heads])
    check(inputs, out[:, :heads], lse)
    assert (out[:, heads] == 7.0).all(), "rows between the output's heads were written"


def test_the_cache_may_be_larger_than_two_to_the_31_elements():
    """Pages far apart: offsets need 64 bits. The middle of the cache is address space nobody touches."""
    spec = make_spec((2, 1), 64, page_size=16)
    pages = 2**31 // (16 * 64) + 3
    k_cache, v_cache = (torch.empty(pages, 16, 1, 64, dtype=torch.bfloat16) for _ in range(2))
    table = torch.tensor([[pages - 1, 0, pages - 2]], dtype=torch.int32)
    small = make_inputs(Case("far", ((3, 40),), spec), torch.bfloat16)
    for cache, source in ((k_cache, small.k_cache), (v_cache, small.v_cache)):
        cache[table[0].long()] = source[small.block_table[0, :3].long()]
    far = small._replace(k_cache=k_cache, v_cache=v_cache, block_table=table)
    out, lse, _ = cuda_sim.attention(far, guard=False)
    expected, expected_lse, _ = cuda_sim.attention(small)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    check(small, out, lse)


@pytest.mark.parametrize("dim", cuda.HEAD_DIMS)
def test_one_launch_moves_each_key_once_and_wastes_no_bank(dim):
    """Facts of the source: K and V of a decode pass once, in full sectors, and no access to shared memory has a bank conflict."""
    inputs = make_inputs(Case("decodes", ((1, 640), (1, 100)), make_spec((8, 2), dim)), torch.bfloat16)
    *_, stats = cuda_sim.attention(inputs, profile=True)
    kv = 2 * 740 * 2 * dim * 2
    q = 2 * 8 * dim * 2
    assert stats["global_to_shared_bytes"] == kv + q
    copies = {line: t for line, t in stats["lines"].items() if line.endswith("copy from global")}
    assert sorted(t["bytes"] for t in copies.values()) == [q, kv]
    assert all(t["sectors"] == t["bytes"] // 32 for t in copies.values())
    assert_no_conflicts(stats)


@pytest.mark.parametrize("dim", cuda.HEAD_DIMS)
def test_prefill_reads_its_keys_once_per_tile_and_wastes_no_bank(dim):
    inputs = make_inputs(Case("chunk", ((100, 200),), make_spec((4, 1), dim)), torch.bfloat16)
    *_, stats = cuda_sim.attention(inputs, profile=True)
    keys = inputs.plan("reference", config=cuda.plan_config(inputs.spec)).work_items[:, [3, 4]].diff().sum().item()
    assert stats["global_to_shared_bytes"] == 2 * keys * dim * 2 + 100 * 4 * dim * 2
    assert_no_conflicts(stats)


def assert_no_conflicts(stats):
    assert stats["ldmatrix_conflicts"] == 0 and stats["ldmatrix_wavefronts"] > 0
    shared = {line: t for line, t in stats["lines"].items() if "shared" in line}
    assert len(shared) >= 8 and not {line: t for line, t in shared.items() if t["conflicts"]}


@pytest.mark.parametrize("short", ["block_table", "sinks", "work_items"])
def test_a_plain_load_beyond_its_buffer_is_caught(short):
    """Planted: a table that ends early. What the kernel reads of it passes through no wrapper, only through the guard pages."""
    inputs = make_inputs(Case("one", ((1, 200),), make_spec(sinks=True)), torch.bfloat16)
    call = cuda_sim.attention_call(inputs)
    cuda_sim.launch(call)
    if short == "work_items":  # a count that promises one more than there is
        call = call._replace(counts=call.counts + torch.tensor([1, 0, 0, 0], dtype=torch.int32))
    else:
        table = getattr(call, short)
        call = call._replace(**{short: table[..., : table.shape[-1] // 2].contiguous()})
    with pytest.raises(RuntimeError, match=rf"out_of_bounds: .*a plain access at byte \d+ of {short}"):
        cuda_sim.launch(call)


def test_refusals_give_the_reason():
    spec = sk.AttentionSpec(4, 4, 80, dtype=torch.bfloat16)
    assert "head_dim must be one of 64, 128, 256, got 80" in cuda.spec_reason(spec)
    assert "got float32" in cuda.spec_reason(sk.AttentionSpec(4, 4, 64))
    assert "int8" in cuda.spec_reason(sk.AttentionSpec(4, 4, 64, dtype=torch.bfloat16, kv_dtype=torch.int8))
    inputs = make_inputs(Case("one", ((1, 20),), make_spec()), torch.bfloat16)
    shifted = torch.empty(inputs.k_cache.numel() + 1, dtype=torch.bfloat16)[1:].view(inputs.k_cache.shape)
    with pytest.raises(ValueError, match="k_cache must have rows that begin at multiples of 16 bytes"):
        cuda_sim.attention(inputs._replace(k_cache=shifted))


def test_tiles_are_those_of_the_kernel():
    """plan_config's tile heights are the kernel's: Tile<Element, head_dim, warps_m, warps_n, row_frags, keys, slots>."""
    import re
    from pathlib import Path

    text = (Path(__file__).parent.parent / "csrc" / "cuda" / "attention_sm80.cuh").read_text()
    tiles = re.findall(r"using (Prefill|Decode) = Tile<Element, (\d+), (\d+), (\d+), (\d+), (\d+), (\d+)>;", text)
    assert len(tiles) == 2 * len(cuda.HEAD_DIMS)
    for kind, dim, warps_m, _, row_frags, _, _ in tiles:
        config = cuda.plan_config(make_spec(head_dim=int(dim)))
        rows = int(warps_m) * int(row_frags) * 16
        assert rows == (config.prefill_rows if kind == "Prefill" else config.decode_rows), (kind, dim)


