"""The planner on the device, in Triton: bit for bit the tables of csrc/plan.cpp, with no copy to the host and no wait for it.

    plan_tiles    (one program)            requests -> tiles, their splits, merge items, totals
    plan_items    (a program per 128)      (tile, split) -> unsorted work items, sort keys, a histogram per program
    plan_offsets  (one program)            where each program's items of each key go; the plan's counts
    plan_place    (a program per 128)      the stable counting sort's last pass

Four short launches, every size read from device memory, so a captured graph replans whatever its inputs then hold. Work is
linear in requests, tiles and items (times a binary search). Inputs are not validated here: that needs the host.
"""

import torch
import triton
import triton.language as tl

from sarathi_kernels.backends.triton_hybrid import ITEM_WIDTH, MERGE_WIDTH

# Must be those of csrc/plan.cpp: buckets per tile class of the counting sort.
BUCKETS = tl.constexpr(128)
KEYS = tl.constexpr(256)
LANES = tl.constexpr(512)
ITEMS = tl.constexpr(128)
# Histograms that plan_offsets takes in one step.
STRIP = tl.constexpr(16)
# Columns of the tile table, and of the totals that plan_tiles leaves for the others.
TILE_REQUEST, TILE_ITEM, TILE_MERGE, TILE_PARTIAL, TILE_WIDTH = (tl.constexpr(i) for i in range(5))
TOTAL_TILES, TOTAL_ITEMS, TOTAL_MERGES, TOTAL_PARTIAL_ROWS = (tl.constexpr(i) for i in range(4))


@triton.jit
def search(sorted, stride, n, x, STEPS: tl.constexpr):
    """The last i in [0, n) with sorted[i * stride] <= x. Needs sorted[0] <= x; 2^STEPS >= n."""
    low = tl.zeros(x.shape, tl.int32)
    high = low + n
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        right = tl.load(sorted + middle * stride, mask=middle < n, other=0) <= x
        right &= middle < high
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    return low


@triton.jit
def request_tiles(cu_seqlens_q, i, ok, GROUP: tl.constexpr, DECODE_ROWS: tl.constexpr, PREFILL_ROWS: tl.constexpr):
    """First query row, query tokens, packed rows, tile height of requests i."""
    q_begin = tl.load(cu_seqlens_q + i, mask=ok, other=0)
    q_len = tl.load(cu_seqlens_q + i + 1, mask=ok, other=0) - q_begin
    rows = q_len * GROUP
    return q_begin, q_len, rows, tl.where(rows > DECODE_ROWS, PREFILL_ROWS, DECODE_ROWS)


@triton.jit
def visible_keys(
    q_len, kv_len, row_begin, row_count, window_left, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """Union of the keys that the rows of a tile may see; as in csrc/plan.cpp."""
    shift = (kv_len - q_len).to(tl.int64)
    end = kv_len.to(tl.int64)
    begin = tl.zeros_like(end)
    if CAUSAL:
        end = tl.minimum(end, shift + (row_begin + row_count - 1) // GROUP + 1)
    if WINDOW:
        begin = tl.maximum(begin, shift + row_begin // GROUP - window_left)
    end = tl.maximum(end, 0)
    return tl.minimum(begin, end).to(tl.int32), end.to(tl.int32)


@triton.jit
def tile_extent(
    cu_seqlens_q, seqused_k, tile_begin, i, t, ok, window_left,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DECODE_ROWS: tl.constexpr, PREFILL_ROWS: tl.constexpr,
):  # fmt: skip
    """Of tiles t, which belong to requests i: the request's first query row, query tokens, keys and packed rows; the tile's rows and keys."""
    q_begin, q_len, rows, height = request_tiles(cu_seqlens_q, i, ok, GROUP, DECODE_ROWS, PREFILL_ROWS)
    kv_len = tl.load(seqused_k + i, mask=ok, other=0)
    row_begin = (t - tl.load(tile_begin + i, mask=ok, other=0)) * height
    row_count = tl.minimum(height, rows - row_begin)
    kv_begin, kv_end = visible_keys(q_len, kv_len, row_begin, row_count, window_left, GROUP, CAUSAL, WINDOW)
    return q_begin, q_len, kv_len, rows, row_begin, row_count, kv_begin, kv_end


@triton.jit
def bucket_of(num_keys):
    x = (num_keys + 63) // 64 + 4
    log2 = (x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    return 4 * log2 + ((x >> (log2 - 2)) & 3)


@triton.jit
def exclusive_sum(x):
    return tl.cumsum(x, 0) - x


@triton.jit(do_not_specialize=["batch", "max_tiles", "max_merges"])
def plan_tiles(
    cu_seqlens_q, seqused_k, tile_begin, tiles, merge_items, totals, batch, window_left, max_tiles, max_merges,
    STEPS: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DECODE_ROWS: tl.constexpr,
    PREFILL_ROWS: tl.constexpr, DECODE_SPLIT: tl.constexpr, PREFILL_SPLIT: tl.constexpr,
):  # fmt: skip
    """tile_begin [batch + 1]: running count of tiles. tiles [max_tiles, TILE_WIDTH], totals [4] int64."""
    lane = tl.arange(0, LANES)
    num_tiles = 0
    for start in range(0, batch, LANES):
        i = start + lane
        ok = i < batch
        _, _, rows, height = request_tiles(cu_seqlens_q, i, ok, GROUP, DECODE_ROWS, PREFILL_ROWS)
        n = tl.where(ok, (rows + height - 1) // height, 0)
        tl.store(tile_begin + i, num_tiles + exclusive_sum(n), mask=ok)
        num_tiles += tl.sum(n, 0)
    tl.store(tile_begin + batch, num_tiles)
    tl.debug_barrier()  # what one thread stored others are about to load

    num_items = tl.zeros([], tl.int64)
    num_merges = 0
    num_partial_rows = tl.zeros([], tl.int64)
    for start in range(0, num_tiles, LANES):
        t = start + lane
        ok = t < num_tiles
        i = search(tile_begin, 1, batch, t, STEPS)
        q_begin, q_len, kv_len, rows, row_begin, row_count, kv_begin, kv_end = tile_extent(
            cu_seqlens_q, seqused_k, tile_begin, i, t, ok, window_left, GROUP, CAUSAL, WINDOW, DECODE_ROWS, PREFILL_ROWS
        )
        split = tl.where(rows > DECODE_ROWS, PREFILL_SPLIT, DECODE_SPLIT)
        splits = tl.where(kv_end > kv_begin, (kv_end - 1) // split - kv_begin // split + 1, 1)
        splits = tl.where(ok, splits, 0)
        merged = (splits > 1).to(tl.int32)
        partial_rows = merged.to(tl.int64) * splits * row_count
        item = num_items + exclusive_sum(splits.to(tl.int64))
        merge = num_merges + exclusive_sum(merged)
        partial = num_partial_rows + exclusive_sum(partial_rows)
        fits = ok & (t < max_tiles)
        tile = tiles + t * TILE_WIDTH
        tl.store(tile + TILE_REQUEST, i, mask=fits)
        tl.store(tile + TILE_ITEM, item.to(tl.int32), mask=fits)
        tl.store(tile + TILE_MERGE, tl.where(merged == 1, merge, -1), mask=fits)
        tl.store(tile + TILE_PARTIAL, partial.to(tl.int32), mask=fits)
        fits = (merged == 1) & (merge < max_merges)
        row = merge_items + merge * MERGE_WIDTH
        tl.store(row + 0, i, mask=fits)
        tl.store(row + 1, row_begin, mask=fits)
        tl.store(row + 2, row_count, mask=fits)
        tl.store(row + 3, q_begin, mask=fits)
        tl.store(row + 4, q_len, mask=fits)
        tl.store(row + 5, kv_len, mask=fits)
        tl.store(row + 6, partial.to(tl.int32), mask=fits)
        tl.store(row + 7, splits, mask=fits)
        num_items += tl.sum(splits.to(tl.int64), 0)
        num_merges += tl.sum(merged, 0)
        num_partial_rows += tl.sum(partial_rows, 0)
    tl.store(totals + TOTAL_TILES, num_tiles.to(tl.int64))
    tl.store(totals + TOTAL_ITEMS, num_items)
    tl.store(totals + TOTAL_MERGES, num_merges.to(tl.int64))
    tl.store(totals + TOTAL_PARTIAL_ROWS, num_partial_rows)


@triton.jit(do_not_specialize=["max_items"])
def plan_items(
    cu_seqlens_q, seqused_k, tile_begin, tiles, totals, unsorted, keys, histograms, window_left, max_items,
    STEPS: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DECODE_ROWS: tl.constexpr,
    PREFILL_ROWS: tl.constexpr, DECODE_SPLIT: tl.constexpr, PREFILL_SPLIT: tl.constexpr,
):  # fmt: skip
    """unsorted [max_items, ITEM_WIDTH] in the order of requests, tiles, splits; keys [max_items]; histograms [programs, KEYS]."""
    num_items = tl.minimum(tl.load(totals + TOTAL_ITEMS), max_items).to(tl.int32)
    num_tiles = tl.minimum(tl.load(totals + TOTAL_TILES), max_items).to(tl.int32)
    if tl.program_id(0) * ITEMS < num_items:
        j = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
        ok = j < num_items
        t = search(tiles + TILE_ITEM, TILE_WIDTH, num_tiles, j, STEPS)
        tile = tiles + t * TILE_WIDTH
        i = tl.load(tile + TILE_REQUEST, mask=ok, other=0)
        s = j - tl.load(tile + TILE_ITEM, mask=ok, other=0)
        merge = tl.load(tile + TILE_MERGE, mask=ok, other=-1)
        q_begin, q_len, kv_len, rows, row_begin, row_count, kv_begin, kv_end = tile_extent(
            cu_seqlens_q, seqused_k, tile_begin, i, t, ok, window_left, GROUP, CAUSAL, WINDOW, DECODE_ROWS, PREFILL_ROWS
        )
        prefill_tile = (rows > DECODE_ROWS).to(tl.int32)
        split = tl.where(prefill_tile == 1, PREFILL_SPLIT, DECODE_SPLIT)
        # 64 bits: the end of the last, open range may lie beyond 2^31.
        split_end = (kv_begin // split + s + 1).to(tl.int64) * split
        partial = tl.load(tile + TILE_PARTIAL, mask=ok, other=0) + s * row_count
        # A tile that sees no key has one item, whose range stays as it is.
        kv_begin = tl.maximum(kv_begin.to(tl.int64), split_end - split).to(tl.int32)
        kv_begin = tl.where(s == 0, tl.minimum(kv_begin, kv_end), kv_begin)
        kv_end = tl.minimum(kv_end.to(tl.int64), split_end).to(tl.int32)
        row = unsorted + j * ITEM_WIDTH
        tl.store(row + 0, i, mask=ok)
        tl.store(row + 1, row_begin, mask=ok)
        tl.store(row + 2, row_count, mask=ok)
        tl.store(row + 3, kv_begin, mask=ok)
        tl.store(row + 4, kv_end, mask=ok)
        tl.store(row + 5, q_begin, mask=ok)
        tl.store(row + 6, q_len, mask=ok)
        tl.store(row + 7, kv_len, mask=ok)
        tl.store(row + 8, prefill_tile, mask=ok)
        tl.store(row + 9, tl.where(merge >= 0, partial, -1), mask=ok)
        tl.store(row + 10, merge, mask=ok)
        tl.store(row + 11, s, mask=ok)
        key = (2 - prefill_tile) * BUCKETS - 1 - bucket_of(kv_end - kv_begin)
        tl.store(keys + j, key, mask=ok)
        # Lanes behind the last item count as the last key, which no item has (its bucket starts at 8).
        counts = tl.histogram(tl.where(ok, key, KEYS - 1), KEYS)
        tl.store(histograms + tl.program_id(0) * KEYS + tl.arange(0, KEYS), counts)


@triton.jit(do_not_specialize=["max_items", "max_merges", "max_partial_rows"])
def plan_offsets(totals, histograms, counts, max_items, max_merges, max_partial_rows):
    """histograms [programs, KEYS] becomes, in place, where each program's first item of each key goes. counts [4]."""
    items = tl.load(totals + TOTAL_ITEMS)
    merges = tl.load(totals + TOTAL_MERGES)
    partial_rows = tl.load(totals + TOTAL_PARTIAL_ROWS)
    num_blocks = tl.cdiv(tl.minimum(items, max_items).to(tl.int32), ITEMS)
    bins = tl.arange(0, KEYS)
    strip = tl.arange(0, STRIP)
    per_key = tl.zeros([KEYS], tl.int32)
    for start in range(0, num_blocks, STRIP):
        at = histograms + (start + strip)[:, None] * KEYS + bins[None, :]
        per_key += tl.sum(tl.load(at, mask=(start + strip < num_blocks)[:, None], other=0), 0)
    first = exclusive_sum(per_key)
    for start in range(0, num_blocks, STRIP):
        at = histograms + (start + strip)[:, None] * KEYS + bins[None, :]
        ok = (start + strip < num_blocks)[:, None]
        n = tl.load(at, mask=ok, other=0)
        tl.store(at, first[None, :] + tl.cumsum(n, 0) - n, mask=ok)
        first += tl.sum(n, 0)
    fits = (items <= max_items) & (merges <= max_merges) & (partial_rows <= max_partial_rows)
    # More work than the tables hold: a negative count, on which attention writes NaN.
    tl.store(counts + 0, tl.where(fits, items, -1).to(tl.int32))
    tl.store(counts + 1, tl.where(fits, tl.sum(tl.where(bins < BUCKETS, per_key, 0), 0), 0))
    tl.store(counts + 2, tl.where(fits, merges, 0).to(tl.int32))
    tl.store(counts + 3, tl.where(fits, partial_rows, 0).to(tl.int32))


@triton.jit(do_not_specialize=["max_items"])
def plan_place(unsorted, keys, offsets, totals, work_items, max_items):
    """Copies each unsorted item to its place: behind all smaller keys and all earlier items of its own."""
    num_items = tl.minimum(tl.load(totals + TOTAL_ITEMS), max_items).to(tl.int32)
    if tl.program_id(0) * ITEMS < num_items:
        lane = tl.arange(0, ITEMS)
        j = tl.program_id(0) * ITEMS + lane
        ok = j < num_items
        key = tl.load(keys + j, mask=ok, other=-1)
        # The same keys along the other axis: [earlier item, item].
        others = tl.load(keys + j, mask=ok, other=-2)
        earlier = (others[:, None] == key[None, :]) & (lane[:, None] < lane[None, :])
        place = tl.load(offsets + tl.program_id(0) * KEYS + key, mask=ok, other=0) + tl.sum(earlier.to(tl.int32), 0)
        for field in tl.static_range(ITEM_WIDTH):
            tl.store(work_items + place * ITEM_WIDTH + field, tl.load(unsorted + j * ITEM_WIDTH + field, mask=ok, other=0), mask=ok)


class Planner:
    """The planner's scratch for one plan, and its launches."""

    def __init__(self, plan):
        """Args: plan: an AttentionPlan whose tables are as large as the plan may ever be."""
        batch, max_items = plan.seqused_k.shape[0], plan.work_items.shape[0]
        self.programs = max(1, triton.cdiv(max_items, ITEMS.value))

        def scratch(*shape, dtype=torch.int32):
            return torch.empty(shape, dtype=dtype, device=plan.device)

        self.tile_begin = scratch(batch + 1)
        self.tiles = scratch(max_items, TILE_WIDTH.value)
        self.totals = scratch(4, dtype=torch.int64)
        self.unsorted = scratch(max_items, ITEM_WIDTH.value)
        self.keys = scratch(max_items)
        self.histograms = scratch(self.programs, KEYS.value)

    def run(self, plan) -> None:
        """Fills plan.work_items, merge_items and counts from its cu_seqlens_q and seqused_k, asynchronously."""
        spec, config = plan.spec, plan.config
        batch, max_items, max_merges = plan.seqused_k.shape[0], plan.work_items.shape[0], plan.merge_items.shape[0]
        constants = dict(
            GROUP=spec.group, CAUSAL=spec.causal, WINDOW=spec.window_left >= 0, DECODE_ROWS=config.decode_rows,
            PREFILL_ROWS=config.prefill_rows, DECODE_SPLIT=config.decode_split, PREFILL_SPLIT=config.prefill_split,
        )  # fmt: skip
        plan_tiles[(1,)](
            plan.cu_seqlens_q, plan.seqused_k, self.tile_begin, self.tiles, plan.merge_items, self.totals, batch, spec.window_left,
            max_items, max_merges, STEPS=batch.bit_length(), **constants, num_warps=8, maxnreg=255,
        )  # fmt: skip
        plan_items[(self.programs,)](
            plan.cu_seqlens_q, plan.seqused_k, self.tile_begin, self.tiles, self.totals, self.unsorted, self.keys, self.histograms,
            spec.window_left, max_items, STEPS=max_items.bit_length(), **constants, num_warps=4,
        )  # fmt: skip
        plan_offsets[(1,)](
            self.totals, self.histograms, plan.counts, max_items, max_merges, plan.partial_out.shape[0], num_warps=8
        )  # fmt: skip
        plan_place[(self.programs,)](
            self.unsorted, self.keys, self.histograms, self.totals, plan.work_items, max_items, num_warps=4
        )  # fmt: skip
