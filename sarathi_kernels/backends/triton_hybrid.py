"""One persistent launch for a hybrid batch, in Triton: prefill tiles and decode tiles drawn from one queue.

    out = softmax(softmax_scale * q k^T + masks) v, online over blocks of keys; float32 scores, maximum, sum and accumulator.

A program draws (work item, kv head) pairs until there are none. An item's tile class picks one of two specialisations of the
same tile: about 128 packed rows for chunks (compute bound), 16 for decodes (bound by HBM, so extra rows would only take
tensor-core time from the chunks). Items of a split row leave normalised float32 partials; whichever of them finishes last
combines all of them in split order. Which program computes an item, and when, therefore never changes a row's bits.
"""

import triton
import triton.language as tl

# Columns of WorkItem and MergeItem in csrc/params.h.
REQUEST, ROW_BEGIN, ROW_COUNT, KV_BEGIN, KV_END, Q_BEGIN, Q_LEN, KV_LEN = (tl.constexpr(i) for i in range(8))
PARTIAL_ROW, MERGE_INDEX = tl.constexpr(9), tl.constexpr(10)
MERGE_PARTIAL_ROW, MERGE_NUM_SPLITS = tl.constexpr(6), tl.constexpr(7)
ITEM_WIDTH, MERGE_WIDTH = tl.constexpr(12), tl.constexpr(8)
# How a cache element becomes a number.
KV_PLAIN, KV_INT8, KV_FP8, KV_FP8_BITS = (tl.constexpr(i) for i in range(4))
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
# One in this many decode visits is held back until the prefill tiles are all taken: small pieces of work level the finish.
DECODE_RESERVE = tl.constexpr(4)
MERGE_ROWS = tl.constexpr(16)


@triton.jit
def prefill_cursor(ticket, prefill_visits, decode_visits):
    """How many of the first `ticket` visits are prefill tiles: prefill's share is spread evenly, a decode reserve comes last."""
    spread = tl.maximum(prefill_visits + decode_visits - decode_visits // DECODE_RESERVE, 1).to(tl.int64)
    taken = (ticket.to(tl.int64) * prefill_visits + spread - 1) // spread
    return tl.minimum(taken, prefill_visits.to(tl.int64)).to(tl.int32)


@triton.jit
def visit_of_ticket(ticket, prefill_visits, decode_visits):
    """The visit (item * num_kv_heads + kv_head) that a ticket stands for, and whether it is a prefill tile.

    Two cursors, one over the prefill items and one over the decode items, both functions of the ticket: one atomic moves both.
    """
    prefills = prefill_cursor(ticket, prefill_visits, decode_visits)
    prefill_tile = prefill_cursor(ticket + 1, prefill_visits, decode_visits) > prefills
    return tl.where(prefill_tile, prefills, prefill_visits + ticket - prefills), prefill_tile


@triton.jit
def tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def dot(a, b, acc, INTERPRET: tl.constexpr):
    # The interpreter computes 16-bit dots on the raw bits; the values, already rounded, are exact in float32.
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def fp8_e4m3_to_float16(bits):
    """Values of e4m3 bytes in float16, exactly, for machines (and the interpreter) whose Triton has no conversion of its own."""
    b = bits.to(tl.int16)
    value = (((b & 0x80) << 8) | ((b & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0  # the exponents' biases differ by 8
    return tl.where((b & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def locate(pages, start, kv_begin, kv_end, MASKED: tl.constexpr, PAGE_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """Page and slot of keys [start, start + KEYS), and which of them exist: pages [1 or KEYS], slots [KEYS]."""
    key = start + tl.arange(0, KEYS)
    exists = (key >= kv_begin) & (key < kv_end)
    if PAGE_SIZE % KEYS == 0:  # the block lies in one page
        page = tl.load(pages + start // PAGE_SIZE)
    elif MASKED:
        page = tl.load(pages + key // PAGE_SIZE, mask=exists, other=0)
    else:
        page = tl.load(pages + key // PAGE_SIZE)
    return page.to(tl.int64), key % PAGE_SIZE, exists


@triton.jit
def tile_mask(rows, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr):
    """rows [ROWS] bool -> [ROWS, HEAD_PAD], or [ROWS, 1] where no padding needs to be masked."""
    if HEAD_DIM == HEAD_PAD:
        mask = rows[:, None]
    else:
        mask = rows[:, None] & (tl.arange(0, HEAD_PAD) < HEAD_DIM)[None, :]
    return mask


@triton.jit
def load_kv(
    cache, page, slot, exists, stride_page, stride_slot, dtype: tl.constexpr, MASKED: tl.constexpr, KV: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """A block of keys or values, [KEYS, HEAD_PAD] in `dtype`. Slots that are not the request's are not read: they may hold NaN."""
    d = tl.arange(0, HEAD_PAD)
    at = cache + (page * stride_page + slot * stride_slot)[:, None] + d[None, :]
    if MASKED:
        tile = tl.load(at, mask=tile_mask(exists, HEAD_DIM, HEAD_PAD), other=0)
    elif HEAD_DIM != HEAD_PAD:
        tile = tl.load(at, mask=(d < HEAD_DIM)[None, :], other=0)
    else:
        tile = tl.load(at)
    if KV == KV_FP8:
        tile = tile.to(tl.float8e4nv, bitcast=True)
    elif KV == KV_FP8_BITS:
        tile = fp8_e4m3_to_float16(tile)
    if KV == KV_INT8 and INTERPRET:
        tile = tile.to(tl.float32)  # the interpreter has no conversion from int8 to bfloat16
    return tile.to(dtype)


@triton.jit
def load_token_scale(scale, page, slot, exists, kv_head, PAGE_SIZE: tl.constexpr, NUM_KV_HEADS: tl.constexpr):
    """Scales of an int8 cache for a block of keys, [KEYS]."""
    return tl.load(scale + (page * PAGE_SIZE + slot) * NUM_KV_HEADS + kv_head, mask=exists, other=0)


@triton.jit
def finish(m, l, sink):
    """What an accumulator is to be multiplied by, and the natural log-sum-exp. m, l [ROWS] in base 2; sink [ROWS] or None."""
    shrink = tl.full(l.shape, 1.0, tl.float32)
    if sink is not None:
        sink = sink * LOG2E
        total = tl.maximum(m, sink)
        total = tl.where(total == float("-inf"), 0.0, total)
        shrink = tl.exp2(m - total)
        l = l * shrink + tl.exp2(sink - total)
        m = total
    seen = l > 0
    l = tl.where(seen, l, 1.0)
    return tl.where(seen, shrink / l, 0.0), tl.where(seen, (m + tl.log2(l)) * LN2, float("-inf"))


@triton.jit
def join_state(m, l, acc, state_lse, value):
    """Rows' running (m, l, acc) once a normalised state joins: value [ROWS, HEAD_PAD], state_lse [ROWS] in base 2."""
    m_new = tl.maximum(m, state_lse)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    weight = tl.exp2(state_lse - m_safe)
    shrink = tl.exp2(m - m_safe)
    return m_new, l * shrink + weight, acc * shrink[:, None] + value * weight[:, None]


@triton.jit
def unpack_rows(q_begin, row_begin, row_count, kv_head, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Packed rows [row_begin, row_begin + ROWS): q row of the first token, then, each [ROWS], tokens from it, query heads, valid.

    The first is 64 bits wide, so that what is added to it per row can be 32: the launch checks that it suffices.
    """
    r = tl.arange(0, ROWS)
    token = (row_begin + r) // GROUP - row_begin // GROUP
    return (q_begin + row_begin // GROUP).to(tl.int64), token, kv_head * GROUP + (row_begin + r) % GROUP, r < row_count


@triton.jit
def write_rows(
    out, lse, values, row_lse, first_token, token, q_head, ok, stride_token, stride_head,
    NUM_Q_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, HEAD_PAD)
    at = out + first_token * stride_token + (token * stride_token + q_head * stride_head)[:, None] + d[None, :]
    tl.store(at, values.to(out.dtype.element_ty), mask=tile_mask(ok, HEAD_DIM, HEAD_PAD))
    if lse is not None:
        tl.store(lse + first_token * NUM_Q_HEADS + (token * NUM_Q_HEADS + q_head), row_lse, mask=ok)


@triton.jit
def attend(
    q, k_cache, v_cache, out, lse, pages, partial_out, partial_lse, sinks, tree_mask, k_scale, v_scale,
    q_stride_token, q_stride_head, out_stride_token, out_stride_head, k_stride_page, k_stride_slot, v_stride_page, v_stride_slot,
    softmax_scale, softcap, window_left, item, kv_head,
    GROUP: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, KV: tl.constexpr, INTERPRET: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, UNMASKED_LOOP: tl.constexpr,
):  # fmt: skip
    """One work item for one kv head."""
    d = tl.arange(0, HEAD_PAD)
    kv_begin = tl.load(item + KV_BEGIN)
    kv_end = tl.load(item + KV_END)
    row_begin = tl.load(item + ROW_BEGIN)
    row_count = tl.load(item + ROW_COUNT)
    shift = tl.load(item + KV_LEN) - tl.load(item + Q_LEN)
    first_token, token, q_head, ok = unpack_rows(tl.load(item + Q_BEGIN), row_begin, row_count, kv_head, GROUP, ROWS)
    position = shift + row_begin // GROUP + token
    at = q + first_token * q_stride_token + (token * q_stride_token + q_head * q_stride_head)[:, None] + d[None, :]
    q_tile = tl.load(at, mask=tile_mask(ok, HEAD_DIM, HEAD_PAD), other=0)
    dtype: tl.constexpr = q.dtype.element_ty

    scale = softmax_scale
    if KV == KV_FP8 or KV == KV_FP8_BITS:
        scale *= tl.load(k_scale + kv_head)
    # With a softcap, `scale` makes the argument of tanh and `unit` takes its result to base 2; without, one factor does both.
    unit = 1.0
    if SOFTCAP:
        scale /= softcap
        unit = softcap * LOG2E
    else:
        scale *= LOG2E
    if tree_mask is not None:
        tree = tl.load(tree_mask + first_token + token, mask=ok, other=0)
        tree_low = tree.to(tl.int32)
        tree_high = (tree >> 32).to(tl.int32)

    # Blocks start at absolute multiples of KEYS. Those in the middle, which every row sees whole, need no mask at all.
    first = kv_begin // KEYS
    blocks = tl.cdiv(kv_end, KEYS) - first
    blocks = tl.where(kv_end > kv_begin, blocks, 0)
    lead = blocks
    unmasked = 0
    if UNMASKED_LOOP:
        middle_begin = kv_begin
        middle_end = kv_end
        if CAUSAL:
            middle_end = tl.minimum(middle_end, shift + row_begin // GROUP + 1)
        if WINDOW:
            middle_begin = tl.maximum(middle_begin, shift + (row_begin + row_count - 1) // GROUP - window_left)
        if tree_mask is not None:
            middle_end = tl.minimum(middle_end, shift)
        lead = tl.minimum(tl.cdiv(middle_begin, KEYS) - first, blocks)
        # A request with more queries than keys makes middle_end negative.
        unmasked = tl.maximum(tl.maximum(middle_end, 0) // KEYS - first - lead, 0)

    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    for masked in tl.static_range(0 if UNMASKED_LOOP else 1, 2):
        for i in tl.range(0, blocks - unmasked if masked else unmasked, num_stages=STAGES):
            if masked:
                start = (first + i + tl.where(i >= lead, unmasked, 0)) * KEYS
            else:
                start = (first + lead + i) * KEYS
            page, slot, exists = locate(pages, start, kv_begin, kv_end, masked, PAGE_SIZE, KEYS)
            k_tile = load_kv(
                k_cache, page, slot, exists, k_stride_page, k_stride_slot, dtype, masked, KV, HEAD_DIM, HEAD_PAD, INTERPRET
            )
            s = dot(q_tile, tl.trans(k_tile), tl.zeros([ROWS, KEYS], tl.float32), INTERPRET) * scale
            if KV == KV_INT8:
                s *= load_token_scale(k_scale, page, slot, exists, kv_head, PAGE_SIZE, NUM_KV_HEADS)[None, :]
            if SOFTCAP:
                s = tanh(s) * unit
            if masked:
                key = start + tl.arange(0, KEYS)
                seen = exists[None, :]
                if CAUSAL:
                    seen &= key[None, :] <= position[:, None]
                if WINDOW:
                    seen &= key[None, :] >= position[:, None] - window_left
                if tree_mask is not None:
                    new = tl.minimum(tl.maximum(key - shift, 0), 63)
                    word = tl.where((new >= 32)[None, :], tree_high[:, None], tree_low[:, None])
                    seen &= ((word >> (new & 31)[None, :]) & 1 == 1) | ((key < shift) | (key - shift > 63))[None, :]
                s = tl.where(seen, s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            # A row that has seen no key yet: its maximum is -inf, and -inf - -inf would be NaN.
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new) if masked else m_new
            p = tl.exp2(s - m_safe[:, None])
            shrink = tl.exp2(m - m_safe)
            l = l * shrink + tl.sum(p, 1)
            m = m_new
            v_tile = load_kv(
                v_cache, page, slot, exists, v_stride_page, v_stride_slot, dtype, masked, KV, HEAD_DIM, HEAD_PAD, INTERPRET
            )
            if KV == KV_INT8:
                p *= load_token_scale(v_scale, page, slot, exists, kv_head, PAGE_SIZE, NUM_KV_HEADS)[None, :]
            acc = dot(p.to(dtype), v_tile, acc * shrink[:, None], INTERPRET)

    if KV == KV_FP8 or KV == KV_FP8_BITS:
        acc *= tl.load(v_scale + kv_head)
    # Row addresses are computed anew: kept from above they would sit in registers all through the loops.
    row_begin = tl.load(item + ROW_BEGIN, volatile=True)
    partial_row = tl.load(item + PARTIAL_ROW)
    first_token, token, q_head, ok = unpack_rows(tl.load(item + Q_BEGIN), row_begin, row_count, kv_head, GROUP, ROWS)
    sink = None
    if sinks is not None:  # of a split row, the sink joins at the merge
        sink = tl.load(sinks + q_head, mask=ok & (partial_row < 0), other=float("-inf"))
    factor, row_lse = finish(m, l, sink)
    acc *= factor[:, None]
    if partial_row >= 0:
        first_at = partial_row.to(tl.int64) * NUM_KV_HEADS + kv_head
        row_at = tl.arange(0, ROWS) * NUM_KV_HEADS
        rows_at = partial_out + first_at * HEAD_DIM + (row_at * HEAD_DIM)[:, None] + d[None, :]
        tl.store(rows_at, acc, mask=tile_mask(ok, HEAD_DIM, HEAD_PAD))
        tl.store(partial_lse + first_at + row_at, row_lse, mask=ok)
    else:
        write_rows(
            out, lse, acc, row_lse, first_token, token, q_head, ok, out_stride_token, out_stride_head,
            GROUP * NUM_KV_HEADS, HEAD_DIM, HEAD_PAD,
        )  # fmt: skip


@triton.jit
def merge_splits(
    out, lse, partial_out, partial_lse, sinks, out_stride_token, out_stride_head,
    row_begin, row_count, q_begin, partial_row, num_splits, kv_head,
    GROUP: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
):  # fmt: skip
    """Combines the partials of one tile and kv head in split order, a few rows at a time to leave registers to the tiles."""
    d = tl.arange(0, HEAD_PAD)
    for begin in range(0, row_count, MERGE_ROWS):
        r = begin + tl.arange(0, MERGE_ROWS)
        ok = r < row_count
        m = tl.full([MERGE_ROWS], float("-inf"), tl.float32)
        l = tl.zeros([MERGE_ROWS], tl.float32)
        acc = tl.zeros([MERGE_ROWS, HEAD_PAD], tl.float32)
        for split in range(num_splits):
            # Past L1 (.cg), which may hold lines of an earlier layer's partials.
            at = (partial_row + split * row_count + r).to(tl.int64) * NUM_KV_HEADS + kv_head
            s = tl.load(partial_lse + at, mask=ok, other=float("-inf"), cache_modifier=".cg") * LOG2E
            value = tl.load(
                partial_out + at[:, None] * HEAD_DIM + d[None, :], mask=tile_mask(ok, HEAD_DIM, HEAD_PAD), other=0,
                cache_modifier=".cg",
            )  # fmt: skip
            m, l, acc = join_state(m, l, acc, s, value)
        first_token, token, q_head, _ = unpack_rows(q_begin, row_begin + begin, MERGE_ROWS, kv_head, GROUP, MERGE_ROWS)
        sink = None
        if sinks is not None:
            sink = tl.load(sinks + q_head, mask=ok, other=0)
        factor, row_lse = finish(m, l, sink)
        write_rows(
            out, lse, acc * factor[:, None], row_lse, first_token, token, q_head, ok, out_stride_token, out_stride_head,
            GROUP * NUM_KV_HEADS, HEAD_DIM, HEAD_PAD,
        )  # fmt: skip


# What changes from step to step must not be compiled in.
@triton.jit(do_not_specialize=["block_table_stride", "total_q", "max_merges"])
def attention_kernel(
    q, k_cache, v_cache, out, lse, block_table, work_items, merge_items, counts, partial_out, partial_lse, counters,
    sinks, tree_mask, k_scale, v_scale,
    q_stride_token, q_stride_head, out_stride_token, out_stride_head,
    k_stride_page, k_stride_slot, k_stride_head, v_stride_page, v_stride_slot, v_stride_head, block_table_stride,
    total_q, max_merges, softmax_scale, softcap, window_left,
    GROUP: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, KV: tl.constexpr,
    INTERPRET: tl.constexpr, PREFILL_ROWS: tl.constexpr, PREFILL_KEYS: tl.constexpr,
    PREFILL_STAGES: tl.constexpr, DECODE_ROWS: tl.constexpr, DECODE_KEYS: tl.constexpr, DECODE_STAGES: tl.constexpr,
):  # fmt: skip
    """Shapes and meaning as in csrc/params.h, AttentionParams. max_merges: arrival counters per kv head, used or not."""
    queue = counters + max_merges * NUM_KV_HEADS  # the next ticket, then the programs that are done; both end at 0
    num_items = tl.load(counts)
    if num_items < 0:  # the planner found more work than its tables hold: no row may pass for a result
        d = tl.arange(0, HEAD_PAD)
        nan = tl.full([HEAD_PAD], float("nan"), tl.float32)
        i = tl.program_id(0).to(tl.int64)
        while i < total_q * (GROUP * NUM_KV_HEADS):
            at = (i // (GROUP * NUM_KV_HEADS)) * out_stride_token + (i % (GROUP * NUM_KV_HEADS)) * out_stride_head
            tl.store(out + at + d, nan.to(out.dtype.element_ty), mask=d < HEAD_DIM)
            if lse is not None:
                tl.store(lse + i, float("nan"))
            i += tl.num_programs(0)
    prefill_visits = tl.load(counts + 1) * NUM_KV_HEADS
    visits = num_items * NUM_KV_HEADS
    ticket = tl.atomic_add(queue, 1)
    while ticket < visits:
        visit, prefill_tile = visit_of_ticket(ticket, prefill_visits, visits - prefill_visits)
        item = work_items + (visit // NUM_KV_HEADS) * ITEM_WIDTH
        kv_head = visit % NUM_KV_HEADS
        request = tl.load(item + REQUEST).to(tl.int64)
        pages = block_table + request * block_table_stride
        k_head = k_cache + kv_head.to(tl.int64) * k_stride_head
        v_head = v_cache + kv_head.to(tl.int64) * v_stride_head
        if prefill_tile:
            attend(
                q, k_head, v_head, out, lse, pages, partial_out, partial_lse, sinks, tree_mask, k_scale, v_scale,
                q_stride_token, q_stride_head, out_stride_token, out_stride_head, k_stride_page, k_stride_slot, v_stride_page,
                v_stride_slot, softmax_scale, softcap, window_left, item, kv_head, GROUP, NUM_KV_HEADS, HEAD_DIM, HEAD_PAD, PAGE_SIZE,
                CAUSAL, WINDOW, SOFTCAP, KV, INTERPRET, PREFILL_ROWS, PREFILL_KEYS, PREFILL_STAGES, True,
            )  # fmt: skip
        else:
            attend(
                q, k_head, v_head, out, lse, pages, partial_out, partial_lse, sinks, tree_mask, k_scale, v_scale,
                q_stride_token, q_stride_head, out_stride_token, out_stride_head, k_stride_page, k_stride_slot, v_stride_page,
                v_stride_slot, softmax_scale, softcap, window_left, item, kv_head, GROUP, NUM_KV_HEADS, HEAD_DIM, HEAD_PAD, PAGE_SIZE,
                CAUSAL, WINDOW, SOFTCAP, KV, INTERPRET, DECODE_ROWS, DECODE_KEYS, DECODE_STAGES, False,
            )  # fmt: skip
        merge_index = tl.load(item + MERGE_INDEX)
        if merge_index >= 0:
            merge = merge_items + merge_index * MERGE_WIDTH
            num_splits = tl.load(merge + MERGE_NUM_SPLITS)
            arrivals = counters + merge_index * NUM_KV_HEADS + kv_head
            # Every thread's partials come before the one thread's release.
            tl.debug_barrier()
            if tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == num_splits - 1:
                merge_splits(
                    out, lse, partial_out, partial_lse, sinks, out_stride_token, out_stride_head, tl.load(item + ROW_BEGIN),
                    tl.load(item + ROW_COUNT), tl.load(item + Q_BEGIN), tl.load(merge + MERGE_PARTIAL_ROW), num_splits, kv_head,
                    GROUP, NUM_KV_HEADS, HEAD_DIM, HEAD_PAD,
                )  # fmt: skip
                tl.store(arrivals, 0)
        ticket = tl.atomic_add(queue, 1)
    if tl.atomic_add(queue + 1, 1) == tl.num_programs(0) - 1:
        tl.store(queue, 0)
        tl.store(queue + 1, 0)
