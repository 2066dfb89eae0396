"""The CUDA backend: adapts calls to the library of csrc/cuda. Imports on any machine; `supports` says what is missing.

    AttentionCall -> the step's AttentionPlan in the binding, made by the first layer -> one launch on torch's current stream
    AppendKvCall ... -> argument block (csrc/params.h, packed here)                    -> likewise
"""

from __future__ import annotations

import functools
import struct
import weakref

import torch

from sarathi_kernels.backends import AppendKvCall, AttentionCall, PlanConfig, Problem
from sarathi_kernels.spec import AttentionSpec

try:
    from sarathi_kernels import _cuda
except ImportError as error:
    _cuda, _missing = None, f"the CUDA library is not there ({error}); install with nvcc on PATH, or SARATHI_CUDA=on to see what fails"

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)
# DType in csrc/params.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}
CTAS_PER_SM = 2

# AttentionParams, AppendKvParams, PlanParams and MergeParams of csrc/params.h, field by field.
ATTENTION_PARAMS = struct.Struct("@15P 11q 9i 2f 3i P")
APPEND_KV_PARAMS = struct.Struct("@10P 12q 8i")
PLAN_PARAMS = struct.Struct("@7P q 3i 8i 4x")
MERGE_PARAMS = struct.Struct("@4P q 3i 4x")


def supports(problem: Problem) -> str | None:
    return spec_reason(problem.spec) or _device_reason(problem.device)


def spec_reason(spec: AttentionSpec) -> str | None:
    """Why the kernels cannot compute the spec, on whatever GPU."""
    if spec.dtype not in DTYPES:
        return f"dtype must be bfloat16 or float16, got {str(spec.dtype).removeprefix('torch.')}"
    if spec.kv_dtype != spec.dtype:
        return f"the cache must hold {str(spec.dtype).removeprefix('torch.')} like the queries, got {str(spec.kv_dtype).removeprefix('torch.')}"
    if spec.head_dim not in HEAD_DIMS:
        return f"head_dim must be one of {', '.join(map(str, HEAD_DIMS))}, got {spec.head_dim}"
    return None


def _device_reason(device: torch.device) -> str | None:
    """Why nothing can be launched on the device."""
    if _cuda is None:
        return _missing
    if device.type != "cuda":
        return f"tensors must be on a CUDA device, got {device}"
    reason = machine_reason()
    if reason is not None:
        return reason
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA, so there can be no tensors on {device}"
    capability = _device_info(torch.cuda.current_device() if device.index is None else device.index)[0]
    return None if capability >= 80 else f"the GPU must have compute capability 8.0 or more, {device} has {capability / 10}"


@functools.lru_cache
def machine_reason() -> str | None:
    """Why this machine can run no CUDA kernel at all, or None: no library, no driver, no device."""
    if _cuda is None:
        return _missing
    if _cuda.driver_version() == 0:
        return "no CUDA driver is installed"
    count, why = _cuda.device_count()
    return None if count else f"there is no CUDA device: {why or 'the driver lists none'}"


@functools.lru_cache
def _device_info(index: int) -> tuple[int, int, int]:
    """(10 * major + minor, SMs, shared memory bytes per block) of a device."""
    return _cuda.device_info(index)


def plan_config(spec: AttentionSpec) -> PlanConfig:
    """The tile heights are the kernel's (Tiles in attention_sm80.cuh). Splits are long enough that writing and merging the
    partial rows is small beside reading the keys, and short enough that a single long request spreads over the GPU."""
    return PlanConfig(decode_rows=16, prefill_rows=64 if spec.head_dim == 256 else 128, decode_split=2048, prefill_split=8192)


def attention_params(call: AttentionCall) -> bytes:
    """What is the same in every layer of a step, as an AttentionParams of csrc/params.h: all but the addresses of q, the caches,
    out, lse, sinks and tree_mask, which are 0.

    Raises:
        ValueError: rows of q, out or a cache do not begin at multiples of 16 bytes, which the kernel's copies need, or a
            stride is 2^31 elements or more.
    """
    q, k, v, out = call.q, call.k_cache, call.v_cache, call.out
    for name, tensor in (("q", q), ("k_cache", k), ("v_cache", v), ("out", out)):
        _check_rows(name, tensor)
    code = DTYPE_CODES[q.dtype]
    return ATTENTION_PARAMS.pack(
        0, 0, 0, 0, 0, call.block_table.data_ptr(),
        call.work_items.data_ptr(), call.merge_items.data_ptr(), call.partial_out.data_ptr(), call.partial_lse.data_ptr(),
        call.counters.data_ptr(), 0, 0, 0, 0,
        *q.stride()[:2], *out.stride()[:2], *k.stride()[:3], *v.stride()[:3], call.block_table.stride(0),
        0, 0, 0, q.shape[1], k.shape[2], q.shape[2], k.shape[1], code, code,
        call.softmax_scale, call.softcap, call.causal, call.window_left, q.shape[0], call.counts.data_ptr(),
    )  # fmt: skip


def append_kv_params(call: AppendKvCall) -> bytes:
    """The call as an AppendKvParams of csrc/params.h.

    Raises:
        ValueError: rows do not begin at multiples of 16 bytes, though head_dim would allow it.
    """
    k, v, kc, vc, q = call.k, call.v, call.k_cache, call.v_cache, call.q
    if k.shape[2] % 8 == 0:
        for name, tensor in (("k", k), ("v", v), ("k_cache", kc), ("v_cache", vc), ("q", q)):
            if tensor is not None:
                _check_rows(name, tensor)
    return APPEND_KV_PARAMS.pack(
        k.data_ptr(), v.data_ptr(), kc.data_ptr(), vc.data_ptr(), call.slot_mapping.data_ptr(), _pointer(q),
        _pointer(call.cos_sin), _pointer(call.positions), 0, 0,
        *k.stride()[:2], *v.stride()[:2], *(q.stride()[:2] if q is not None else (0, 0)), *kc.stride()[:3], *vc.stride()[:3],
        k.shape[0], q.shape[1] if q is not None else 0, k.shape[1], k.shape[2],
        call.cos_sin.shape[1] if call.cos_sin is not None else 0, kc.shape[1], DTYPE_CODES[k.dtype], DTYPE_CODES[kc.dtype],
    )  # fmt: skip


def merge_params(outs: torch.Tensor, lses: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> bytes:
    """The call as a MergeParams of csrc/params.h."""
    return MERGE_PARAMS.pack(
        outs.data_ptr(), lses.data_ptr(), out.data_ptr(), lse.data_ptr(),
        lse.numel(), outs.shape[0], outs.shape[3], DTYPE_CODES[outs.dtype],
    )  # fmt: skip


# The tensors of an AttentionCall that a step's layers share, and its scalars.
_TABLES = slice(AttentionCall._fields.index("block_table"), AttentionCall._fields.index("counters") + 1)
_SCALARS = slice(AttentionCall._fields.index("softmax_scale"), None)
# key of a step -> (the binding's AttentionPlan, weak references to the step's tables). A plan holds the tables' addresses and
# not the tables, so it goes when the first of them goes.
_plans: dict[tuple, tuple] = {}


def attention(call: AttentionCall) -> None:
    q, k, v, out = call.q, call.k_cache, call.v_cache, call.out
    key = (*map(id, call[_TABLES]), q.dtype, q.shape, q.stride(), k.shape, k.stride(), v.stride(), out.stride(), *call[_SCALARS])
    made = _plans.get(key)
    if made is None:
        if not call.work_items.shape[0]:
            return
        if not _rows_aligned(q):
            return attention(_with_dense_q(call))
        made = _plans[key] = _make_plan(call), [weakref.ref(table, lambda _: _plans.pop(key, None)) for table in call[_TABLES]]
    pointers = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
    if (pointers[0] | pointers[1] | pointers[2] | pointers[3]) & 15:
        for name, tensor in (("k_cache", k), ("v_cache", v), ("out", out)):
            _check_rows(name, tensor)
        return attention(_with_dense_q(call))
    made[0].run(*pointers, _pointer(call.lse), _pointer(call.sinks), _pointer(call.tree_mask), _stream(q.get_device()))


def _make_plan(call: AttentionCall):
    device = call.q.get_device()
    units = call.work_items.shape[0] * call.k_cache.shape[2]
    return _cuda.AttentionPlan(attention_params(call), min(units, CTAS_PER_SM * _device_info(device)[1]), device)


def _with_dense_q(call: AttentionCall) -> AttentionCall:
    """Queries may lie anywhere; those whose rows the kernel cannot copy are copied here."""
    return call._replace(q=call.q.clone(memory_format=torch.contiguous_format))


def append_kv(call: AppendKvCall) -> None:
    device = call.k.get_device()
    _cuda.append_kv(append_kv_params(call), device, _stream(device))


def merge_states(outs: torch.Tensor, lses: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    device = outs.get_device()
    _cuda.merge_states(merge_params(outs, lses, out, lse), device, _stream(device))


def _stream(device: int) -> int:
    """torch's current stream of the device, which need not be the current device; without the Stream object around it."""
    return torch._C._cuda_getCurrentRawStream(device)


class DevicePlanner:
    """Plans on the device, in one launch: the scratch for one AttentionPlan, and `run`."""

    def __init__(self, plan):
        self._tile_begin = torch.empty(plan.seqused_k.shape[0] + 1, dtype=torch.int32, device=plan.device)
        self._tiles = torch.empty(plan.work_items.shape[0], 4, dtype=torch.int32, device=plan.device)

    def params(self, plan) -> bytes:
        """The plan as a PlanParams of csrc/params.h."""
        spec, config = plan.spec, plan.config
        return PLAN_PARAMS.pack(
            plan.cu_seqlens_q.data_ptr(), plan.seqused_k.data_ptr(), plan.work_items.data_ptr(), plan.merge_items.data_ptr(),
            plan.counts.data_ptr(), self._tile_begin.data_ptr(), self._tiles.data_ptr(), plan.partial_out.shape[0],
            plan.seqused_k.shape[0], plan.work_items.shape[0], plan.merge_items.shape[0],
            spec.group, spec.page_size, spec.causal, spec.window_left, *config,
        )  # fmt: skip

    def run(self, plan) -> None:
        device = plan.work_items.get_device()
        _cuda.plan(self.params(plan), device, _stream(device))


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rows_aligned(tensor: torch.Tensor) -> bool:
    """Whether every innermost row of a 16-bit tensor begins at a multiple of 16 bytes."""
    return tensor.numel() == 0 or not (tensor.data_ptr() % 16 or any(s % 8 for s in tensor.stride()[:-1]))


def _check_rows(name: str, tensor: torch.Tensor) -> None:
    if not _rows_aligned(tensor):
        raise ValueError(
            f"{name} must have rows that begin at multiples of 16 bytes, got address {tensor.data_ptr():#x} "
            f"and strides {tensor.stride()} of {tensor.dtype}"
        )
    if max(tensor.stride()) >= 2**31:
        raise ValueError(f"{name} must have strides below 2^31 elements, got {tensor.stride()}")
