"""append_kv and merge_states of the CUDA backend: their own source in the host simulator, against the reference backend."""

import cuda_sim
import pytest
import torch

from sarathi_kernels.backends import AppendKvCall, cuda, reference

TOKENS, Q_HEADS, KV_HEADS, PAGES, PAGE_SIZE, POSITIONS = 11, 6, 2, 5, 4, 50


def append_call(dtype, head_dim, rotary_dim=None, with_q=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Slices of one projection, as a model has them: rows are dense, tokens and heads are strided.
    qkv = torch.randn(TOKENS, Q_HEADS + 2 * KV_HEADS + 1, head_dim, generator=generator).to(dtype)
    q, k, v = qkv[:, :Q_HEADS], qkv[:, Q_HEADS : Q_HEADS + KV_HEADS], qkv[:, Q_HEADS + KV_HEADS : -1]
    caches = [torch.randn(PAGES, PAGE_SIZE, KV_HEADS, head_dim, generator=generator).to(dtype) for _ in range(2)]
    slots = torch.randperm(PAGES * PAGE_SIZE, generator=generator)[:TOKENS]
    slots[3] = -1
    rotary = {}
    if rotary_dim is not None:
        angles = torch.rand(POSITIONS, rotary_dim // 2, generator=generator) * 7
        rotary["cos_sin"] = torch.cat((angles.cos(), angles.sin()), dim=-1)
        rotary["positions"] = torch.randint(POSITIONS, (TOKENS,), generator=generator, dtype=torch.int32)
    return AppendKvCall(
        k, v, *caches, slots, q if rotary and with_q else None, rotary.get("positions"), rotary.get("cos_sin"), None, None
    )


def clone(call):
    return AppendKvCall(*(t.clone(memory_format=torch.preserve_format) if isinstance(t, torch.Tensor) else t for t in call))


@pytest.mark.parametrize("dtype", cuda.DTYPES)
@pytest.mark.parametrize("head_dim, rotary_dim", [(64, None), (64, 64), (128, 128), (128, 32), (256, 64), (80, 20), (12, 6), (7, None)])
@pytest.mark.parametrize("with_q", [True, False])
def test_append_kv(dtype, head_dim, rotary_dim, with_q):
    call = append_call(dtype, head_dim, rotary_dim, with_q)
    expected = clone(call)
    reference.append_kv(expected)
    cuda_sim.append_kv(call, grid=3, seed=1)
    names = ["k_cache", "v_cache"] + (["q"] if call.q is not None else [])
    for name in names:
        got, want = getattr(call, name).to(torch.float64), getattr(expected, name).to(torch.float64)
        # Rotation is float32 arithmetic, rounded once: at most one ulp of the 16-bit type from the float64 one.
        tolerance = torch.finfo(dtype).eps * want.abs().clamp(min=1e-3) if call.cos_sin is not None and name != "v_cache" else 0
        assert ((got - want).abs() <= tolerance).all(), name


def test_append_kv_refuses_misaligned_rows():
    call = append_call(torch.bfloat16, 64)
    shifted = torch.empty(call.k_cache.numel() + 1, dtype=torch.bfloat16)[1:].view(call.k_cache.shape)
    with pytest.raises(ValueError, match="k_cache must have rows that begin at multiples of 16 bytes"):
        cuda_sim.append_kv(call._replace(k_cache=shifted))


@pytest.mark.parametrize("dtype", cuda.DTYPES)
@pytest.mark.parametrize("states, head_dim", [(1, 64), (2, 128), (5, 256), (3, 20)])
def test_merge_states(dtype, states, head_dim):
    generator = torch.Generator().manual_seed(states)
    outs = torch.randn(states, 9, 3, head_dim, generator=generator).to(dtype)
    lses = torch.randn(states, 9, 3, generator=generator) * 5
    lses[torch.rand(lses.shape, generator=generator) < 0.3] = -torch.inf
    lses[:, 4] = -torch.inf
    expected, expected_lse = reference.combine(outs.to(torch.float64), lses.to(torch.float64))
    outs[torch.isneginf(lses)] = torch.nan  # a state that saw no key may hold anything
    out, lse = cuda_sim.merge_states(outs, lses, grid=2, seed=1)
    assert (out[4] == 0).all() and torch.isneginf(lse[4]).all()
    torch.testing.assert_close(out.to(torch.float64), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
    torch.testing.assert_close(lse.to(torch.float64), expected_lse, rtol=1e-6, atol=1e-6)
