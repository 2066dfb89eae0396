"""One step's work, laid out once and shared by every layer: work items and merge items as int32 tables.

    requests (cu_seqlens_q, seqused_k, block_table)  ->  plan()  ->  AttentionPlan  ->  attention(), once per layer

The tables' columns are the fields of `WorkItem` and `MergeItem` in csrc/params.h, in the same order.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch

from sarathi_kernels import _native, backends
from sarathi_kernels.backends import PlanConfig, Problem
from sarathi_kernels.spec import AttentionSpec

# Columns of `work_items`.
REQUEST, ROW_BEGIN, ROW_COUNT, KV_BEGIN, KV_END, Q_BEGIN, Q_LEN, KV_LEN, TILE_CLASS, PARTIAL_ROW, MERGE_INDEX, SPLIT_INDEX = range(12)
WORK_ITEM_FIELDS = (
    "request", "row_begin", "row_count", "kv_begin", "kv_end", "q_begin", "q_len", "kv_len",
    "tile_class", "partial_row", "merge_index", "split_index",
)  # fmt: skip
MERGE_ITEM_FIELDS = ("request", "row_begin", "row_count", "q_begin", "q_len", "kv_len", "partial_row", "num_splits")
DECODE_TILE, PREFILL_TILE = 0, 1
_CPU = torch.device("cpu")


class ItemCost(NamedTuple):
    """What each work item costs, for all kv heads together.

    Attributes:
        flops: [num_items] float64, multiply-adds counted as two, visible (query, key) pairs only.
        bytes: [num_items] float64, keys and values read once plus query rows read and output rows written.
    """

    flops: torch.Tensor
    bytes: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionPlan:
    """The work of one step. Made by `plan`, read by `attention` in every layer; a caller has no need to look inside.

    Attributes:
        spec: the model's attention.
        backend: name of the backend the plan was made for; `attention` runs on it.
        config: tile heights and split lengths, the backend's choice for this spec.
        cu_seqlens_q, seqused_k, block_table: the inputs, int32, on `device`.
        work_items: [num_items, 12] int32 (columns: WORK_ITEM_FIELDS).
        merge_items: [num_merges, 8] int32 (columns: MERGE_ITEM_FIELDS).
        counts: [4] int32: num_items, num_prefill_items, num_merges, num_partial_rows.
        partial_out: [num_partial_rows, num_kv_heads, head_dim] float32 scratch for split rows.
        partial_lse: [num_partial_rows, num_kv_heads] float32 scratch.
        counters: [num_merges * num_kv_heads + 4] int32, zero between calls: arrivals per merge and head, then the work queue.
        total_q: query tokens in the batch.
        max_page: largest page id in use, -1 when there is none.
        planner: what `refill` runs, for a plan made with `limits`; else None. The tables of such a plan have room to spare:
            only `counts` says how much of them is in use.
    """

    spec: AttentionSpec
    backend: str
    config: PlanConfig
    cu_seqlens_q: torch.Tensor
    seqused_k: torch.Tensor
    block_table: torch.Tensor
    work_items: torch.Tensor
    merge_items: torch.Tensor
    counts: torch.Tensor
    partial_out: torch.Tensor
    partial_lse: torch.Tensor
    counters: torch.Tensor
    total_q: int
    max_page: int
    planner: Any = None

    def refill(self) -> None:
        """Plans anew, on the device, from what `cu_seqlens_q` and `seqused_k` now hold. Only for plans made with `limits`.

        Copies nothing to the host and waits for nothing, so it can be captured in a CUDA graph, before the layers that use
        the plan. `verify` tells whether the batch kept within the limits; if not, `attention` writes NaN.
        """
        if self.planner is None:
            raise ValueError("this plan was made on the host for one batch; give plan() limits to get one that can be refilled")
        self.planner.run(self)

    def verify(self) -> None:
        """Waits for the device, and raises ValueError if the batch of the last `refill` did not fit the plan's limits."""
        if int(self.counts[0]) < 0:
            have = (self.work_items.shape[0], self.merge_items.shape[0], self.partial_out.shape[0])
            raise ValueError(
                f"the batch is beyond the plan's limits: its work does not fit {have[0]} work items, {have[1]} merge items and "
                f"{have[2]} partial rows; query tokens per request {self.cu_seqlens_q.diff().tolist()}, keys {self.seqused_k.tolist()}"
            )

    @property
    def device(self) -> torch.device:
        return self.work_items.device

    @property
    def num_items(self) -> int:
        return self.work_items.shape[0]

    @property
    def num_prefill_items(self) -> int:
        return int(self.counts[1])

    @property
    def num_merges(self) -> int:
        return self.merge_items.shape[0]

    def cost(self) -> ItemCost:
        """Operations and bytes of each work item, from its rows and key range alone."""
        spec, items = self.spec, self.work_items[: int(self.counts[0])].cpu().to(torch.int64)
        flops = 4.0 * spec.head_dim * spec.num_kv_heads * visible_pairs(spec, items).to(torch.float64)
        keys = (items[:, KV_END] - items[:, KV_BEGIN]).to(torch.float64)
        rows = items[:, ROW_COUNT].to(torch.float64)
        kv_bytes = 2.0 * spec.head_dim * spec.kv_dtype.itemsize + (8.0 if spec.kv_dtype == torch.int8 else 0.0)
        row_bytes = torch.where(
            items[:, PARTIAL_ROW] >= 0,
            spec.head_dim * (spec.dtype.itemsize + 4.0) + 4.0,
            2.0 * spec.head_dim * spec.dtype.itemsize,
        )
        return ItemCost(flops, spec.num_kv_heads * (keys * kv_bytes + rows * row_bytes))


def visible_pairs(spec: AttentionSpec, items: torch.Tensor) -> torch.Tensor:
    """Visible (packed row, key) pairs per work item, [num_items] int64: the sum over rows of the row's keys in range."""
    counts = items[:, ROW_COUNT]
    owner = torch.repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    row = torch.arange(len(owner)) - first[owner] + items[owner, ROW_BEGIN]
    position = items[owner, KV_LEN] - items[owner, Q_LEN] + row // spec.group
    begin, end = items[owner, KV_BEGIN], items[owner, KV_END]
    if spec.causal:
        end = torch.minimum(end, position + 1)
    if spec.window_left >= 0:
        begin = torch.maximum(begin, position - spec.window_left)
    return torch.zeros(len(items), dtype=torch.int64).index_add_(0, owner, (end - begin).clamp(min=0))


class Limits(NamedTuple):
    """How large the batches of a plan that is refilled on the device may get. Requests and pages: as the tables given to `plan`.

    Attributes:
        total_q: query tokens, of the whole batch.
        kv_tokens: keys of all requests together; None is every request at the block table's full width, which may ask for
            much scratch. Where requests share no pages, the cache's num_pages * page_size is a safe bound.
    """

    total_q: int
    kv_tokens: int | None = None

    def capacity(self, spec: AttentionSpec, config: PlanConfig, batch: int, max_kv_len: int) -> tuple[int, int, int]:
        """(work items, merge items, partial rows) that no batch within the limits exceeds."""
        rows = self.total_q * spec.group
        kv_tokens = min(batch * max_kv_len, self.kv_tokens if self.kv_tokens is not None else batch * max_kv_len)
        # A request has one decode tile, or prefill tiles of which only the last is short.
        decode_tiles = min(batch, self.total_q)
        prefill_tiles = rows // config.prefill_rows + min(batch, rows // (config.decode_rows + 1))
        # A range of n keys from key 0 on crosses at most (n - 1) / split boundaries.
        decode_merges = min(decode_tiles, kv_tokens // config.decode_split)
        decode_splits = kv_tokens // config.decode_split + decode_merges
        prefill_splits = -(-max_kv_len // config.prefill_split)
        prefill_merges = prefill_tiles if prefill_splits > 1 else 0
        decode_rows = min(config.decode_rows, rows) * decode_splits
        prefill_rows = rows * prefill_splits if prefill_merges else 0
        items = decode_tiles + kv_tokens // config.decode_split + prefill_tiles * max(prefill_splits, 1)
        return items, decode_merges + prefill_merges, decode_rows + prefill_rows


class Workspace:
    """Buffers that grow and are used again, so that a step allocates nothing. Hand the same one to `plan` every step.

    A plan made with a workspace is valid until the next `plan` call with the same workspace.
    """

    def __init__(self):
        self._buffers: dict[tuple[str, torch.device], torch.Tensor] = {}
        # The last view of each buffer: a step often has its predecessor's shapes, and making views is most of a plan's cost.
        self._views: dict[tuple[str, torch.device], tuple] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, zero: bool = False) -> torch.Tensor:
        """A tensor of `shape` over the buffer called `name`. `zero`: zero when first allocated (and left so by its users)."""
        key, wanted = (name, device), (shape, dtype)
        last = self._views.get(key)
        if last is not None and last[0] == wanted:
            return last[1]
        size = math.prod(shape)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            make = torch.zeros if zero else torch.empty
            buffer = make(max(2 * size, 64), dtype=dtype, device=device)
            self._buffers[key] = buffer
        view = buffer[:size].view(shape)
        self._views[key] = wanted, view
        return view

    def take_tables(self, num_items: int, num_merges: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        """One int32 block, so that a GPU needs one copy, and its parts: (block, counts, work_items, merge_items)."""
        key, wanted = ("table parts", device), (num_items, num_merges)
        block = self.take("tables", (4 + 12 * num_items + 8 * num_merges,), torch.int32, device)
        last = self._views.get(key)
        if last is not None and last[0] == wanted and last[1][0] is block:
            return last[1]
        items_end = 4 + 12 * num_items
        parts = (block, block[:4], block[4:items_end].view(num_items, 12), block[items_end:].view(num_merges, 8))
        self._views[key] = wanted, parts
        return parts


def plan(
    spec: AttentionSpec,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    *,
    backend: str = "auto",
    device: torch.device | str | None = None,
    workspace: Workspace | None = None,
    config: PlanConfig | None = None,
    limits: Limits | None = None,
) -> AttentionPlan:
    """Lays out one step's attention. Prefill chunks and decodes are both just rows of `cu_seqlens_q`.

    Args:
        spec: the model's attention.
        cu_seqlens_q: [batch + 1] int32, running count of query tokens; request i owns q rows
            [cu_seqlens_q[i], cu_seqlens_q[i + 1]), possibly none.
        seqused_k: [batch] int32, keys of each request in the cache, this step's tokens included.
        block_table: [batch, max_pages] int32, pages of each request in order. Entries beyond a request's last key are
            never read. Pages may be shared between requests.
        backend: "auto", or the name of a backend, which then must support `spec`.
        device: where `attention` will run; defaults to the device of `block_table`.
        workspace: buffers to use again instead of allocating.
        config: tile heights and split lengths other than the backend's own choice, for tuning and tests. Split lengths
            may be any positive number; tile heights must be ones the backend's kernels have.
        limits: plan on the device instead of the host, with tables for any batch within these limits. The plan then keeps the
            three tensors, and `refill` reads them again: change them in place, leave requests that are not there without
            query tokens (a flat end of `cu_seqlens_q`), and capture `refill` and the layers in one CUDA graph. q has
            limits.total_q rows; rows beyond cu_seqlens_q[-1] stay unwritten. Values are trusted, not checked.

    Returns:
        The plan, valid for every layer of this step.

    Raises:
        ValueError: a shape, dtype or value is wrong; a page is missing or negative; or no backend (or not the one named)
            supports the spec, with each one's reason.
    """
    for name, tensor, ndim in (("cu_seqlens_q", cu_seqlens_q, 1), ("seqused_k", seqused_k, 1), ("block_table", block_table, 2)):
        if tensor.ndim != ndim or tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be {ndim}-D int32, got {tensor.ndim}-D {tensor.dtype} of shape {tuple(tensor.shape)}")
    batch = seqused_k.shape[0]
    if cu_seqlens_q.shape[0] != batch + 1 or block_table.shape[0] != batch:
        raise ValueError(
            f"batch sizes disagree: seqused_k has {batch} requests, cu_seqlens_q {cu_seqlens_q.shape[0]} entries "
            f"(want {batch + 1}), block_table {block_table.shape[0]} rows (want {batch})"
        )
    device = block_table.device if device is None else torch.device(device)
    name = backends.select(Problem(spec, device), backend)
    if config is None:
        config = backends.get(name).plan_config(spec)
    elif min(config) < 1:
        raise ValueError(f"tile heights and split lengths must be positive, got {config}")
    if limits is not None:
        return _plan_on_device(spec, cu_seqlens_q, seqused_k, block_table, name, config, device, workspace or Workspace(), limits)
    lens, keys, table = cu_seqlens_q.cpu().contiguous(), seqused_k.cpu().contiguous(), block_table.cpu()
    if table.shape[1] > 1 and table.stride(1) != 1:
        table = table.contiguous()

    draft = _native.make_plan(
        (spec.group, spec.page_size, int(spec.causal), spec.window_left, *config),
        lens.data_ptr(), keys.data_ptr(), table.data_ptr(), table.stride(0), batch, table.shape[1],
    )  # fmt: skip
    num_items, num_merges, num_partial_rows = draft.num_items, draft.num_merges, draft.num_partial_rows
    workspace = workspace or Workspace()
    tables, counts, work_items, merge_items = workspace.take_tables(num_items, num_merges, _CPU)
    draft.write(tables.data_ptr())
    if device.type != "cpu":
        on_host = tables
        tables, counts, work_items, merge_items = workspace.take_tables(num_items, num_merges, device)
        tables.copy_(on_host)
        lens, keys, table = cu_seqlens_q.to(device), seqused_k.to(device), block_table.to(device)
    return AttentionPlan(
        spec=spec,
        backend=name,
        config=config,
        cu_seqlens_q=lens,
        seqused_k=keys,
        block_table=table,
        work_items=work_items,
        merge_items=merge_items,
        counts=counts,
        **_scratch(spec, num_merges, num_partial_rows, workspace, device),
        total_q=draft.total_q,
        max_page=draft.max_page,
    )


def _scratch(spec: AttentionSpec, num_merges: int, num_partial_rows: int, workspace: Workspace, device: torch.device) -> dict[str, torch.Tensor]:
    """What split rows need: each split's result, and counters of those that have arrived."""
    rows, heads = num_partial_rows, spec.num_kv_heads
    return {
        "partial_out": workspace.take("partial_out", (rows, heads, spec.head_dim), torch.float32, device),
        "partial_lse": workspace.take("partial_lse", (rows, heads), torch.float32, device),
        "counters": workspace.take("counters", (num_merges * heads + 4,), torch.int32, device, zero=True),
    }


def _plan_on_device(spec, cu_seqlens_q, seqused_k, block_table, name, config, device, workspace, limits) -> AttentionPlan:
    make_planner = getattr(backends.get(name), "DevicePlanner", None)
    if make_planner is None:
        raise ValueError(f"backend {name!r} has no planner on the device: make its plans without limits")
    if device.index is None and device.type == block_table.device.type:
        device = block_table.device
    for what, tensor in (("cu_seqlens_q", cu_seqlens_q), ("seqused_k", seqused_k), ("block_table", block_table)):
        if tensor.device != device or (tensor.numel() > 1 and tensor.stride(-1) != 1):
            raise ValueError(
                f"a plan with limits reads {what} in place: it must be on {device} with innermost stride 1, "
                f"got {tensor.device} with strides {tensor.stride()}"
            )
    batch = seqused_k.shape[0]
    items, merges, partial_rows = limits.capacity(spec, config, batch, block_table.shape[1] * spec.page_size)
    if partial_rows >= 2**31:
        raise ValueError(f"limits {limits} ask for {partial_rows} partial rows, more than 2^31: give kv_tokens, or larger splits")
    _, counts, work_items, merge_items = workspace.take_tables(items, merges, device)
    made = AttentionPlan(
        spec=spec,
        backend=name,
        config=config,
        cu_seqlens_q=cu_seqlens_q,
        seqused_k=seqused_k,
        block_table=block_table,
        work_items=work_items,
        merge_items=merge_items,
        counts=counts,
        **_scratch(spec, merges, partial_rows, workspace, device),
        total_q=limits.total_q,
        max_page=-1,
    )
    made = dataclasses.replace(made, planner=make_planner(made))
    made.refill()
    return made
