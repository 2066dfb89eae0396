"""The CUDA backend's kernels on the CPU: its own binding (on functions that only take notes), its own kernel source, launched
in the host simulator. Every tensor moves into guarded memory for the launch: plain loads and stores beyond its ends are faults.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
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


class Recorded(ctypes.Structure):
    """An attention that the binding launched, as tests/sim/recorded_launches.cpp keeps it."""

    _fields_ = [
        ("params", ctypes.c_char * cuda.ATTENTION_PARAMS.size),
        ("num_blocks", ctypes.c_int), ("stream", ctypes.c_void_p), ("device", ctypes.c_int),
    ]  # fmt: skip


@contextlib.contextmanager
def recording():
    """The backend on the recording binding, for CPU tensors. Gives a function that returns the latest attention."""
    module = build.module("_cuda_recorded")
    latest = ctypes.CDLL(module.__file__).sarathi_recorded_attention
    latest.restype = ctypes.POINTER(Recorded)
    with mock.patch.multiple(cuda, _cuda=module, _stream=lambda device: 7):
        yield lambda: latest().contents


def attention(inputs: Inputs, *, config=None, num_blocks: int = 4, out=None, plan=None, guard: bool = True, **settings):
    """(out, lse, stats) of the sm_80 kernel. settings: of the simulator: seed, completion, num_sms, ..."""
    call = attention_call(inputs, config, out, plan)
    stats = launch(call, num_blocks, guard=guard, **settings)
    assert not call.counters.any(), "counters must be zero after every call"
    return call.out, call.lse, stats


def launch(call: AttentionCall, num_blocks: int = 4, guard: bool = True, **settings) -> dict:
    """One attention launch; its totals, {} when the backend launches nothing. guard=False: in the tensors' own memory, for
    those too large to move."""
    with _moved(call, {"out", "lse", "partial_out", "partial_lse", "counters"}, guard) as (moved, buffers), recording() as latest:
        latest().num_blocks = 0
        cuda.attention(moved)
        if latest().num_blocks == 0:  # nothing to do, so nothing launched
            return {}
        params = bytes(memoryview(latest()))[: cuda.ATTENTION_PARAMS.size]
        return build.module("_sim").attention_sm80(params, num_blocks, buffers, **settings)


def append_kv(call: AppendKvCall, **settings) -> dict:
    with _moved(call, {"k_cache", "v_cache", "q"}) as (moved, buffers):
        return build.module("_sim").append_kv(cuda.append_kv_params(moved), buffers, **settings)


def merge_states(outs, lses, **settings):
    states = MergeCall(outs, lses, torch.full(outs.shape[1:], torch.nan, dtype=outs.dtype), torch.full(lses.shape[1:], torch.nan))
    with _moved(states, {"out", "lse"}) as (moved, buffers):
        build.module("_sim").merge_states(cuda.merge_params(*moved), buffers, **settings)
    return states.out, states.lse


class MergeCall(NamedTuple):
    outs: torch.Tensor
    lses: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor


class PlanTables(NamedTuple):
    """What the planner kernel reads and writes of an AttentionPlan, and its scratch."""

    cu_seqlens_q: torch.Tensor
    seqused_k: torch.Tensor
    work_items: torch.Tensor
    merge_items: torch.Tensor
    counts: torch.Tensor
    tile_begin: torch.Tensor
    tiles: torch.Tensor


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
    tables = PlanTables(*(getattr(made, name) for name in PlanTables._fields[:5]), planner._tile_begin, planner._tiles)
    with _moved(tables, set(PlanTables._fields[2:])) as (moved, buffers):
        planner._tile_begin, planner._tiles = moved.tile_begin, moved.tiles
        params = planner.params(dataclasses.replace(made, **{name: getattr(moved, name) for name in PlanTables._fields[:5]}))
        build.module("_sim").plan(params, buffers, **settings)
    return made


@contextlib.contextmanager
def _moved(call, written: set[str], guard: bool = True):
    """(the call on guarded copies of its tensors, what else to register with the simulator). Copies `written` ones back."""
    if not guard:
        yield call, [_buffer(name, t, name in written) for name, t in _tensors(call).items()]
        return
    held, moved = [], {}
    for name, tensor in _tensors(call).items():
        span = _span(tensor)
        shift = tensor.data_ptr() % 16  # a misaligned tensor stays one
        pages = build.module("_sim").GuardedBuffer(name, shift + span.numel() * span.element_size(), name in written)
        copy = torch.from_numpy(np.asarray(pages))[shift:].view(tensor.dtype)
        copy.copy_(span)
        if name in written:
            held.append((span.view(torch.uint8), copy.view(torch.uint8), span.view(torch.uint8).clone()))
        moved[name] = copy.as_strided(tensor.shape, tensor.stride())
    yield call._replace(**moved), []
    for span, copy, before in held:  # only what changed: tensors may lie in each other's gaps
        torch.where(copy == before, span, copy, out=span)


def _tensors(call) -> dict[str, torch.Tensor]:
    return {name: t for name, t in call._asdict().items() if isinstance(t, torch.Tensor) and t.numel()}


def _span(tensor: torch.Tensor) -> torch.Tensor:
    """The memory from the tensor's first element to its last: gaps of a strided one are inside."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
    return tensor.as_strided((last + 1,), (1,), tensor.storage_offset())


def _buffer(name, tensor, writable):
    """(address, bytes, name, writable)"""
    return tensor.data_ptr(), _span(tensor).numel() * tensor.element_size(), name, writable
