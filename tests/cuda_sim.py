"""The CUDA backend's kernels on the CPU: its own argument packing, its own kernel source, launched in the host simulator."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

from sarathi_kernels.backends import AppendKvCall, AttentionCall, cuda
from sarathi_kernels.testing import Inputs

sys.path.insert(0, str(Path(__file__).parent / "sim"))
import build  # noqa: E402

# Scheduling and asynchronous completion. Seed 0 runs in index order; others interleave warps at random.
SCHEDULES = [(seed, completion) for seed in (1, 2, 3) for completion in ("late", "eager", "random")]


def attention_call(inputs: Inputs, config=None, out=None, plan=None) -> AttentionCall:
    """What the op would hand to the backend, on CPU tensors, planned with the backend's configuration (or `config`)."""
    plan = plan or inputs.plan("reference", config=config or cuda.plan_config(inputs.spec))
    spec, rows = inputs.spec, inputs.q.shape[:2]
    return AttentionCall(
        inputs.q, inputs.k_cache, inputs.v_cache,
        torch.full(inputs.q.shape, torch.nan, dtype=inputs.q.dtype) if out is None else out, torch.full(rows, torch.nan),
        plan.cu_seqlens_q, plan.seqused_k, plan.block_table,
        plan.work_items, plan.merge_items, plan.counts, plan.partial_out, plan.partial_lse, plan.counters,
        inputs.kwargs.get("sinks"), inputs.kwargs.get("tree_mask"), None, None,
        spec.softmax_scale, spec.softcap, spec.causal, spec.window_left,
    )  # fmt: skip


def attention(inputs: Inputs, *, config=None, num_blocks: int = 4, out=None, plan=None, **settings):
    """(out, lse, stats) of the sm_80 kernel. settings: of the simulator: seed, completion, num_sms, ..."""
    call = attention_call(inputs, config, out, plan)
    written = {"out", "lse", "partial_out", "partial_lse", "counters"}
    stats = build.module("_sim").attention_sm80(cuda.attention_params(call), num_blocks, _buffers(call, written), **settings)
    assert not call.counters.any(), "counters must be zero after every call"
    return call.out, call.lse, stats


def append_kv(call: AppendKvCall, **settings) -> dict:
    written = {"k_cache", "v_cache", "q"}
    return build.module("_sim").append_kv(cuda.append_kv_params(call), _buffers(call, written), **settings)


def merge_states(outs, lses, **settings):
    out, lse = torch.full(outs.shape[1:], torch.nan, dtype=outs.dtype), torch.full(lses.shape[1:], torch.nan)
    buffers = [_buffer("outs", outs, False), _buffer("lses", lses, False), _buffer("out", out, True), _buffer("lse", lse, True)]
    build.module("_sim").merge_states(cuda.merge_params(outs, lses, out, lse), buffers, **settings)
    return out, lse


def plan_on_device(plan, capacity=None, **settings):
    """The plan's batch laid out again by the planner kernel, in tables of `capacity` (items, merges, partial rows) or just enough."""
    items, merges, partial_rows = capacity or (len(plan.work_items), len(plan.merge_items), len(plan.partial_out))
    made = dataclasses.replace(
        plan,
        work_items=torch.full((items, 12), -7, dtype=torch.int32),
        merge_items=torch.full((merges, 8), -7, dtype=torch.int32),
        counts=torch.full((4,), -7, dtype=torch.int32),
        partial_out=torch.empty(partial_rows, *plan.partial_out.shape[1:]),
    )
    planner = cuda.DevicePlanner(made)
    tensors = [("cu_seqlens_q", made.cu_seqlens_q, False), ("seqused_k", made.seqused_k, False), ("work_items", made.work_items, True)]
    tensors += [("merge_items", made.merge_items, True), ("counts", made.counts, True)]
    tensors += [("tile_begin", planner._tile_begin, True), ("tiles", planner._tiles, True)]
    build.module("_sim").plan(planner.params(made), [_buffer(*t) for t in tensors if t[1].numel()], **settings)
    return made


def _buffers(call, written):
    tensors = {name: t for name, t in call._asdict().items() if isinstance(t, torch.Tensor)}
    return [_buffer(name, t, name in written) for name, t in tensors.items() if t.numel()]


def _buffer(name, tensor, writable):
    """(address, bytes, name, writable) from the tensor's first element to its last: gaps of a strided one are inside."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), (last + 1) * tensor.element_size(), name, writable
