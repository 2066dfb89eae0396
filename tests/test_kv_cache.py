"""append_kv against the definition, its rotary embedding, its quantized caches, and what it refuses."""

import pytest
import torch

import sarathi_kernels as sk
from sarathi_kernels.backends import reference

BACKENDS = ["cpu", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def table(max_position, rotary_dim):
    angle = torch.outer(torch.arange(max_position).float(), 1e4 ** (-torch.arange(rotary_dim // 2) / (rotary_dim // 2)))
    return torch.cat((angle.cos(), angle.sin()), dim=1)


def new_tokens(spec, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(n, spec.num_kv_heads, spec.head_dim, generator=generator).to(spec.dtype) for _ in range(2))
    q = torch.randn(n, spec.num_q_heads, spec.head_dim, generator=generator).to(spec.dtype)
    slots = torch.randperm(6 * spec.page_size, generator=generator)[:n]
    return q, k, v, slots


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_each_token_lands_in_its_slot_and_nothing_else_changes(page_size, dtype, backend):
    spec = sk.AttentionSpec(4, 2, 64, page_size=page_size, dtype=dtype)
    _, k, v, slots = new_tokens(spec, 5)
    slots[2] = -1
    caches = [torch.full(spec.kv_cache_shape(6), 3.0, dtype=dtype) for _ in range(2)]
    sk.append_kv(spec, k, v, *caches, slots, backend=backend)
    for rows, cache in zip((k, v), caches):
        flat = cache.view(-1, 2, 64)
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                assert torch.equal(flat[slot], rows[token])
        untouched = torch.ones(len(flat), dtype=torch.bool)
        untouched[slots[slots >= 0]] = False
        assert (flat[untouched] == 3.0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotary_dim", [64, 32, 20])
def test_rotary_embedding(rotary_dim, dtype):
    spec = sk.AttentionSpec(4, 2, 64, page_size=4, dtype=dtype)
    q, k, v, slots = new_tokens(spec, 20)
    slots[7] = -1
    positions, cos_sin = torch.randint(0, 50, (20,), dtype=torch.int32), table(50, rotary_dim)
    results = {}
    for backend in BACKENDS:
        k_cache, v_cache = (torch.zeros(spec.kv_cache_shape(6), dtype=dtype) for _ in range(2))
        rotated = q.clone()
        sk.append_kv(spec, k, v, k_cache, v_cache, slots, q=rotated, positions=positions, cos_sin=cos_sin, backend=backend)
        results[backend] = (rotated.double(), k_cache.double(), v_cache.double())
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-2, torch.float16: 4e-3}[dtype]
    for a, b in zip(results["cpu"], results["reference"]):
        assert (a - b).abs().max() <= tolerance
    exact = reference.rotate(q.double(), cos_sin, positions)
    # Written again from complex numbers: a rotation multiplies (x_i, x_{i + half}) by exp(i * angle).
    half = rotary_dim // 2
    turn = torch.complex(cos_sin[positions.long(), :half].double(), cos_sin[positions.long(), half:].double()).unsqueeze(1)
    pair = torch.complex(q.double()[..., :half], q.double()[..., half:rotary_dim]) * turn
    assert torch.allclose(torch.cat((pair.real, pair.imag, q.double()[..., rotary_dim:]), -1), exact)
    assert (results["cpu"][0] - exact).abs().max() <= tolerance


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    """k, v and q as views of one fused projection."""
    spec = sk.AttentionSpec(4, 2, 64, page_size=4)
    qkv = torch.randn(6, 8, 64)
    before = qkv.clone()
    slots, positions, cos_sin = torch.arange(6), torch.arange(6, dtype=torch.int32), table(9, 64)
    k_cache, v_cache = (torch.zeros(spec.kv_cache_shape(6)) for _ in range(2))
    sk.append_kv(spec, qkv[:, 4:6], qkv[:, 6:], k_cache, v_cache, slots, q=qkv[:, :4], positions=positions, cos_sin=cos_sin, backend=backend)
    assert torch.allclose(qkv[:, :4], reference.rotate(before[:, :4], cos_sin, positions), atol=1e-6)
    assert torch.allclose(k_cache.view(-1, 2, 64)[:6], reference.rotate(before[:, 4:6], cos_sin, positions), atol=1e-6)
    assert torch.equal(qkv[:, 4:], before[:, 4:]) and torch.equal(v_cache.view(-1, 2, 64)[:6], before[:, 6:])


def test_slots_and_positions_follow_the_block_table():
    spec = sk.AttentionSpec(4, 2, 64, page_size=4)
    cu, used = torch.tensor([0, 3, 3, 4, 7], dtype=torch.int32), torch.tensor([9, 5, 1, 2], dtype=torch.int32)
    block_table = torch.tensor([[7, 3, 5], [1, 2, 0], [4, 0, 0], [6, 0, 0]], dtype=torch.int32)
    plan = sk.plan(spec, cu, used, block_table, backend="reference")
    assert sk.token_positions(plan).tolist() == [6, 7, 8, 0, -1, 0, 1]
    assert sk.slot_mapping(plan).tolist() == [3 * 4 + 2, 3 * 4 + 3, 5 * 4, 4 * 4, -1, 6 * 4, 6 * 4 + 1]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(slots=torch.tensor([0, 24])), r"slot_mapping must lie in \[-1, 23\], got values from 0 to 24"),
        (dict(slots=torch.tensor([0, -2])), r"slot_mapping must lie in \[-1, 23\], got values from -2 to 0"),
        (dict(slots=torch.tensor([0, 1], dtype=torch.int32)), "slot_mapping must be 1-D contiguous int64, got torch.int32"),
        (dict(k=torch.zeros(2, 2, 32)), r"k must be torch.float32 of shape \(2, 2, 64\)"),
        (dict(v=torch.zeros(3, 2, 64)), r"v must be torch.float32 of shape \(2, 2, 64\)"),
        (dict(positions=torch.tensor([0, 50], dtype=torch.int32)), r"positions must lie in \[0, 49\], got values from 0 to 50"),
        (dict(positions=None), "rotary embedding needs positions and cos_sin together"),
        (dict(cos_sin=torch.zeros(50, 66)), "rotary_dim even and at most head_dim 64"),
        (dict(q=torch.zeros(2, 4, 32)), "q must be torch.float32 of shape"),
    ],
)
def test_a_refused_append_leaves_the_cache_as_it_was(change, message):
    spec = sk.AttentionSpec(4, 2, 64, page_size=4)
    k_cache, v_cache = (torch.full(spec.kv_cache_shape(6), 5.0) for _ in range(2))
    arguments = dict(
        k=torch.ones(2, 2, 64), v=torch.ones(2, 2, 64), slots=torch.tensor([0, 1]),
        positions=torch.tensor([0, 1], dtype=torch.int32), cos_sin=table(50, 64), q=torch.ones(2, 4, 64),
    )  # fmt: skip
    arguments.update(change)
    k, v, slots = (arguments.pop(name) for name in ("k", "v", "slots"))
    before = arguments["q"].clone()
    with pytest.raises(ValueError, match=message):
        sk.append_kv(spec, k, v, k_cache, v_cache, slots, **arguments)
    assert (k_cache == 5.0).all() and (v_cache == 5.0).all() and torch.equal(arguments["q"], before)


def test_float8_cache_rounds_to_nearest_and_saturates():
    spec = sk.AttentionSpec(2, 2, 16, page_size=4, dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn)
    k = torch.randn(3, 2, 16, dtype=torch.bfloat16) * 4
    k[0, 0, 0] = 1e5
    scale = torch.tensor([0.5, 2.0])
    k_cache, v_cache = (torch.zeros(spec.kv_cache_shape(2)).to(torch.float8_e4m3fn) for _ in range(2))
    sk.append_kv(spec, k, k, k_cache, v_cache, torch.arange(3), k_scale=scale, v_scale=scale, backend="reference")
    got = k_cache.view(-1, 2, 16)[:3].float() * scale[:, None]
    assert got[0, 0, 0] == 448 * 0.5
    mask = k.float().abs() < 100
    assert ((got - k.float()).abs() / k.float().abs().clamp(min=0.05))[mask].max() <= 2**-4 + 1e-3


def test_opcheck():
    spec = sk.AttentionSpec(4, 2, 64, page_size=4)
    q, k, v, slots = new_tokens(spec, 5)
    caches = [torch.zeros(spec.kv_cache_shape(6)) for _ in range(2)]
    args = (k, v, *caches, slots, q, torch.arange(5, dtype=torch.int32), table(9, 64), None, None, "cpu")
    torch.library.opcheck(torch.ops.sarathi.append_kv, args)
