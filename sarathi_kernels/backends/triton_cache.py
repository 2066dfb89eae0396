"""Memory-bound companions of attention, in Triton: new keys and values into their pages, and merging of partial results.

append_kv: one program per token and block of heads; the rotary embedding, the quantisation and the store happen on the way.
merge_states: one program per block of rows; states are combined in their order, online.
"""

import triton
import triton.language as tl

from sarathi_kernels.backends.triton_hybrid import KV_FP8, KV_FP8_BITS, KV_INT8, LOG2E, finish, join_state

HEADS = tl.constexpr(8)
STATE_ROWS = tl.constexpr(16)


@triton.jit
def round_to_even(x):
    """The nearest integer, for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def float_to_fp8_e4m3(x):
    """e4m3 bytes of float32 values, rounded to nearest even and saturated; NaN stays NaN."""
    magnitude = tl.where(x == x, tl.minimum(tl.abs(x), 448.0), 0.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the steps are of 2^-9; rounding up to 8 of them gives the smallest normal number's code.
    subnormal = round_to_even(tl.minimum(magnitude, 0.015625) * 512.0).to(tl.int32)
    code = tl.where(magnitude < 0.015625, subnormal, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def load_part(rows, ok, BEGIN: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr):
    """Elements [BEGIN, BEGIN + WIDTH) of each row in float32, [rows, PAD], zeros behind."""
    d = tl.arange(0, PAD)
    return tl.load(rows[:, None] + BEGIN + d[None, :], mask=ok[:, None] & (d < WIDTH)[None, :], other=0).to(tl.float32)


@triton.jit
def store_part(rows, ok, values, step, BEGIN: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr, KV: tl.constexpr):
    """Stores [rows, PAD] float32 values as cache elements; step [rows] is a quantised cache's scale."""
    d = tl.arange(0, PAD)
    if KV == KV_INT8:
        values = round_to_even(tl.where((step > 0)[:, None], values / tl.where(step > 0, step, 1.0)[:, None], 0.0)).to(tl.int8)
    elif KV == KV_FP8 or KV == KV_FP8_BITS:
        values = float_to_fp8_e4m3(values / step[:, None])
    else:
        values = values.to(rows.dtype.element_ty)
    tl.store(rows[:, None] + BEGIN + d[None, :], values, mask=ok[:, None] & (d < WIDTH)[None, :])


@triton.jit
def rotate(rows, ok, cos_sin, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """The two rotated halves of each row, float32 [rows, HALF_PAD]. cos_sin points to the position's row."""
    d = tl.arange(0, HALF_PAD)
    cos = tl.load(cos_sin + d, mask=d < HALF, other=0)[None, :]
    sin = tl.load(cos_sin + HALF + d, mask=d < HALF, other=0)[None, :]
    first = load_part(rows, ok, 0, HALF, HALF_PAD)
    second = load_part(rows, ok, HALF, HALF, HALF_PAD)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def store_kv(
    rows, cache, scale, token_scale, cos_sin, kv_head, ok, HALF: tl.constexpr, HALF_PAD: tl.constexpr, REST: tl.constexpr,
    REST_PAD: tl.constexpr, KV: tl.constexpr,
):  # fmt: skip
    """Rows of one token's heads to the cache. rows, cache [heads] pointers; token_scale [heads] pointers (int8)."""
    step = tl.zeros(kv_head.shape, tl.float32)
    if HALF > 0:
        first, second = rotate(rows, ok, cos_sin, HALF, HALF_PAD)
    if REST > 0:
        rest = load_part(rows, ok, 2 * HALF, REST, REST_PAD)
    if KV == KV_INT8:
        if HALF > 0:
            step = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
        if REST > 0:
            step = tl.maximum(step, tl.max(tl.abs(rest), 1))
        step = step / 127.0
        tl.store(token_scale, step, mask=ok)
    elif KV == KV_FP8 or KV == KV_FP8_BITS:
        step = tl.load(scale + kv_head, mask=ok, other=1.0)
    if HALF > 0:
        store_part(cache, ok, first, step, 0, HALF, HALF_PAD, KV)
        store_part(cache, ok, second, step, HALF, HALF, HALF_PAD, KV)
    if REST > 0:
        store_part(cache, ok, rest, step, 2 * HALF, REST, REST_PAD, KV)


@triton.jit
def append_kv_kernel(
    k, v, k_cache, v_cache, slot_mapping, q, positions, cos_sin, k_scale, v_scale,
    k_stride_token, k_stride_head, v_stride_token, v_stride_head, q_stride_token, q_stride_head,
    kc_stride_page, kc_stride_slot, kc_stride_head, vc_stride_page, vc_stride_slot, vc_stride_head,
    NUM_Q_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, REST: tl.constexpr, REST_PAD: tl.constexpr,
    KV: tl.constexpr,
):  # fmt: skip
    """Shapes and meaning as in csrc/params.h, AppendKvParams. Grid: (tokens, blocks of kv heads, then blocks of q heads)."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    kv_blocks = tl.cdiv(NUM_KV_HEADS, HEADS)
    angles = cos_sin
    if HALF > 0:
        angles += tl.load(positions + token).to(tl.int64) * (2 * HALF)
    if block < kv_blocks:
        slot = tl.load(slot_mapping + token)
        head = block * HEADS + tl.arange(0, HEADS).to(tl.int64)
        ok = (head < NUM_KV_HEADS) & (slot >= 0)
        page = slot // PAGE_SIZE
        offset = slot % PAGE_SIZE
        store_kv(
            k + token * k_stride_token + head * k_stride_head,
            k_cache + page * kc_stride_page + offset * kc_stride_slot + head * kc_stride_head,
            k_scale, k_scale + slot * NUM_KV_HEADS + head if KV == KV_INT8 else None, angles, head, ok,
            HALF, HALF_PAD, REST, REST_PAD, KV,
        )  # fmt: skip
        store_kv(
            v + token * v_stride_token + head * v_stride_head,
            v_cache + page * vc_stride_page + offset * vc_stride_slot + head * vc_stride_head,
            v_scale, v_scale + slot * NUM_KV_HEADS + head if KV == KV_INT8 else None, angles, head, ok,
            0, HALF_PAD, HEAD_DIM, HEAD_PAD, KV,
        )  # fmt: skip
    elif q is not None:
        head = (block - kv_blocks) * HEADS + tl.arange(0, HEADS).to(tl.int64)
        ok = head < NUM_Q_HEADS
        rows = q + token * q_stride_token + head * q_stride_head
        first, second = rotate(rows, ok, angles, HALF, HALF_PAD)
        d = tl.arange(0, HALF_PAD)
        inside = ok[:, None] & (d < HALF)[None, :]
        tl.store(rows[:, None] + d[None, :], first.to(q.dtype.element_ty), mask=inside)
        tl.store(rows[:, None] + HALF + d[None, :], second.to(q.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "num_states"])
def merge_states_kernel(outs, lses, out, lse, rows, num_states, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr):
    """Shapes and meaning as in csrc/params.h, MergeParams."""
    row = tl.program_id(0).to(tl.int64) * STATE_ROWS + tl.arange(0, STATE_ROWS)
    ok = row < rows
    d = tl.arange(0, HEAD_PAD)
    m = tl.full([STATE_ROWS], float("-inf"), tl.float32)
    l = tl.zeros([STATE_ROWS], tl.float32)
    acc = tl.zeros([STATE_ROWS, HEAD_PAD], tl.float32)
    for state in range(num_states):
        at = state * rows.to(tl.int64) + row
        s = tl.load(lses + at, mask=ok, other=float("-inf")) * LOG2E
        # A state that saw no key may hold anything, NaN included: it is not read.
        used = (ok & (s > float("-inf")))[:, None] & (d < HEAD_DIM)[None, :]
        value = tl.load(outs + at[:, None] * HEAD_DIM + d[None, :], mask=used, other=0).to(tl.float32)
        m, l, acc = join_state(m, l, acc, s, value)
    factor, row_lse = finish(m, l, None)
    acc *= factor[:, None]
    tl.store(out + row[:, None] * HEAD_DIM + d[None, :], acc.to(out.dtype.element_ty), mask=ok[:, None] & (d < HEAD_DIM)[None, :])
    tl.store(lse + row, row_lse, mask=ok)
