"""Adapter to the native CPU kernels: argument blocks as in csrc/params.h, packed field by field."""

from __future__ import annotations

import math
import struct

import torch

from sarathi_kernels import _native
from sarathi_kernels.backends import AppendKvCall, AttentionCall, PlanConfig, Problem
from sarathi_kernels.spec import AttentionSpec

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
MAX_HEAD_DIM = 512
# Native alignment, and its padding at the end: the size must equal sizeof(struct), which the native side checks.
_ATTENTION = struct.Struct("@5P P2P 2P P 2P 2P 2q 2q 3q 3q q 3i 4i 2i 2f 2i P0q")
_APPEND_KV = struct.Struct("@6P 2P 2P 6q 6q 6i 2i 0q")
_MERGE = struct.Struct("@4P q 2i i 0q")


def supports(problem: Problem) -> str | None:
    spec = problem.spec
    if problem.device.type != "cpu":
        return f"it runs on the CPU, and the tensors are on {problem.device}"
    if spec.dtype not in _DTYPES:
        return f"dtype must be float32, bfloat16 or float16, got {spec.dtype}"
    if spec.kv_dtype not in _DTYPES:
        return f"kv_dtype must be the dtype or int8, got {spec.kv_dtype}"
    if spec.head_dim % 8 or spec.head_dim > MAX_HEAD_DIM:
        return f"head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {spec.head_dim}"
    return None


def plan_config(spec: AttentionSpec) -> PlanConfig:
    # A decode of one token streams its keys; up to 8 packed rows (2 tokens of group 4) take the same way. Splits are long
    # enough that a merge costs nothing beside them and short enough that two cores finish together.
    return PlanConfig(decode_rows=max(8, spec.group), prefill_rows=96, decode_split=1024, prefill_split=8192)


def isa() -> str:
    """The instruction set in use: the best this CPU has, or what SARATHI_CPU_ISA or `set_isa` said."""
    return _native.cpu_isa()


def set_isa(name: str) -> None:
    """Uses the kernels for `name` from now on, process-wide.

    Raises:
        ValueError: this CPU cannot run them; names those it can.
    """
    _native.cpu_set_isa(name)


def isas() -> list[str]:
    """The instruction sets this CPU can run, fastest last."""
    return _native.cpu_isas()


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def pack_attention(call: AttentionCall) -> bytes:
    """The argument block of one attention call, sinks and tree mask contiguous. It holds addresses: the tensors must outlive it."""
    q, k, v, out = call.q, call.k_cache, call.v_cache, call.out
    num_items, num_prefill_items, num_merges, _ = call.counts.tolist()
    num_pages, page_size, num_kv_heads, head_dim = k.shape
    return _ATTENTION.pack(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), _address(call.lse),
        call.block_table.data_ptr(), call.work_items.data_ptr(), call.merge_items.data_ptr(),
        call.partial_out.data_ptr(), call.partial_lse.data_ptr(), call.counters.data_ptr(),
        _address(call.sinks), _address(call.tree_mask), _address(call.k_scale), _address(call.v_scale),
        *q.stride()[:2], *out.stride()[:2], *k.stride()[:3], *v.stride()[:3], call.block_table.stride(0),
        num_items, num_prefill_items, num_merges, q.shape[1], num_kv_heads, head_dim, page_size,
        _DTYPES[q.dtype], _DTYPES[k.dtype], call.softmax_scale, call.softcap, call.causal, call.window_left, 0,
    )  # fmt: skip


def attention(call: AttentionCall) -> None:
    call = call._replace(**{name: t.contiguous() for name in ("sinks", "tree_mask") if (t := getattr(call, name)) is not None})
    _native.cpu_attention(pack_attention(call), torch.get_num_threads())


def pack_append_kv(call: AppendKvCall) -> bytes:
    """Likewise for append_kv."""
    k, v, q, k_cache, v_cache = call.k, call.v, call.q, call.k_cache, call.v_cache
    return _APPEND_KV.pack(
        k.data_ptr(), v.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), call.slot_mapping.data_ptr(), _address(q),
        _address(call.cos_sin), _address(call.positions), _address(call.k_scale), _address(call.v_scale),
        *k.stride()[:2], *v.stride()[:2], *((0, 0) if q is None else q.stride()[:2]), *k_cache.stride()[:3], *v_cache.stride()[:3],
        k.shape[0], 0 if q is None else q.shape[1], k.shape[1], k.shape[2],
        0 if call.cos_sin is None else call.cos_sin.shape[1], k_cache.shape[1], _DTYPES[k.dtype], _DTYPES[k_cache.dtype],
    )  # fmt: skip


def append_kv(call: AppendKvCall) -> None:
    _native.cpu_append_kv(pack_append_kv(call), torch.get_num_threads())


def merge_states(outs: torch.Tensor, lses: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    rows = math.prod(outs.shape[1:-1])
    packed = _MERGE.pack(
        outs.data_ptr(), lses.data_ptr(), out.data_ptr(), lse.data_ptr(), rows, outs.shape[0], outs.shape[-1], _DTYPES[outs.dtype]
    )
    _native.cpu_merge_states(packed, torch.get_num_threads())
