"""The CUDA backend: adapts calls to the library of csrc/cuda. Imports on any machine; `supports` says what is missing.

    AttentionCall -> argument block (csrc/params.h, packed here) -> one launch on torch's current stream
"""

from __future__ import annotations

import functools
import struct

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
    """The call as an AttentionParams of csrc/params.h.

    Raises:
        ValueError: rows of q, out or a cache do not begin at multiples of 16 bytes, which the kernel's copies need, or a
            stride is 2^31 elements or more.
    """
    q, k, v, out, table = call.q, call.k_cache, call.v_cache, call.out, call.block_table
    pointers = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
    q_token, q_head, _ = q.stride()
    out_token, out_head, _ = out.stride()
    k_page, k_slot, k_head, _ = k.stride()
    v_page, v_slot, v_head, _ = v.stride()
    # All at once, as this runs in every layer; the tensor to blame is looked for when there is one.
    strides = q_token | q_head | out_token | out_head | k_page | k_slot | k_head | v_page | v_slot | v_head
    if (pointers[0] | pointers[1] | pointers[2] | pointers[3]) & 15 or strides & 7 or strides >> 31:
        for name, tensor in (("q", q), ("k_cache", k), ("v_cache", v), ("out", out)):
            _check_rows(name, tensor)
    total_q, num_q_heads, head_dim = q.shape
    _, page_size, num_kv_heads, _ = k.shape
    code = DTYPE_CODES[q.dtype]
    return ATTENTION_PARAMS.pack(
        *pointers, _pointer(call.lse), table.data_ptr(),
        call.work_items.data_ptr(), call.merge_items.data_ptr(), call.partial_out.data_ptr(), call.partial_lse.data_ptr(),
        call.counters.data_ptr(), _pointer(call.sinks), _pointer(call.tree_mask), 0, 0,
        q_token, q_head, out_token, out_head, k_page, k_slot, k_head, v_page, v_slot, v_head, table.stride(0),
        0, 0, 0, num_q_heads, num_kv_heads, head_dim, page_size, code, code,
        call.softmax_scale, call.softcap, call.causal, call.window_left, total_q, call.counts.data_ptr(),
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


def attention(call: AttentionCall) -> None:
    if not _rows_aligned(call.q):
        call = call._replace(q=call.q.contiguous())
    units = call.work_items.shape[0] * call.k_cache.shape[2]
    if units:
        device = call.q.device
        _launch(device, _cuda.attention_sm80, attention_params(call), min(units, CTAS_PER_SM * _device_info(device.index)[1]))


def append_kv(call: AppendKvCall) -> None:
    _launch(call.k.device, _cuda.append_kv, append_kv_params(call))


def merge_states(outs: torch.Tensor, lses: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    _launch(outs.device, _cuda.merge_states, merge_params(outs, lses, out, lse))


def _launch(device: torch.device, function, *arguments) -> None:
    """Enqueues on torch's current stream of the device, which need not be the current device."""
    stream = torch.cuda.current_stream(device).cuda_stream
    if device.index == torch.cuda.current_device():
        function(*arguments, stream)
    else:
        with torch.cuda.device(device):
            function(*arguments, stream)


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
        _launch(plan.device, _cuda.plan, self.params(plan))


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
