"""The Triton backend: what it supports, and the launches of its kernels.

    triton_hybrid    attention, one persistent launch        triton_cache   append_kv, merge_states
    triton_planner   the planner on the device               triton_config  tile sizes

The kernels' modules import triton, so they are imported at the first launch: this one imports without it.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

from sarathi_kernels.backends import AppendKvCall, AttentionCall, PlanConfig, Problem
from sarathi_kernels.backends import triton_config as config
from sarathi_kernels.spec import AttentionSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


def supports(problem: Problem) -> str | None:
    spec, device = problem
    if device.type == "cpu" and not config.interpreting():
        return "Triton runs on GPUs; on CPU tensors only in its slow interpreter, with TRITON_INTERPRET=1 in the environment"
    if device.type not in ("cpu", "cuda"):
        return f"Triton runs on CUDA GPUs, not on {device.type}"
    if device.type == "cuda" and torch.version.hip:
        return "its tile sizes are for NVIDIA GPUs; this PyTorch is built for AMD's"
    if device.type == "cuda" and config.interpreting():
        return "TRITON_INTERPRET=1 is set, which makes Triton run on CPU tensors only"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if spec.dtype not in DTYPES:
        return f"dtype must be float32, bfloat16 or float16, not {str(spec.dtype).removeprefix('torch.')}"
    if spec.quantized_kv and spec.dtype == torch.float32:
        return "a quantized cache wants 16-bit queries: float32 tiles of converted keys do not fit the registers"
    if spec.head_dim > MAX_HEAD_DIM:
        return f"head_dim must be at most {MAX_HEAD_DIM}, not {spec.head_dim}"
    if device.type == "cuda":
        return _device_reason(spec, device)
    return None


def _device_reason(spec: AttentionSpec, device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return f"this torch ({torch.__version__}) sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if config.arch_of(capability) is None:
        return f"no tile sizes for sm_{capability[0]}{capability[1]}; there are {', '.join(f'sm_{arch}' for arch in config.ARCHS)}"
    want = config.tiles(spec, config.arch_of(capability)).shared_bytes
    have = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if want > have:
        return f"its tiles need {want} bytes of shared memory, the device has {have} per block"
    return None


def plan_config(spec: AttentionSpec) -> PlanConfig:
    tiles = config.tiles(spec, _arch(None))
    return PlanConfig(config.decode_rows(spec, tiles), tiles.prefill_rows, tiles.decode_split, tiles.prefill_split)


def _arch(device: torch.device | None) -> int:
    """Row of the table for a device; None is the current one, or the newest where there is none."""
    if config.interpreting():
        return config.INTERPRETER_ARCH
    if not torch.cuda.is_available():
        return config.ARCHS[-1]
    return config.arch_of(torch.cuda.get_device_capability(device))


@functools.lru_cache(maxsize=None)
def _num_sms(device: torch.device) -> int:
    # In the interpreter programs run one after another; two of them show that the queue ends where it should.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def kv_kind(dtype: torch.dtype, arch: int) -> int:
    """How the kernels read a cache element: the KV_ constants of triton_hybrid."""
    from sarathi_kernels.backends import triton_hybrid as kernels

    if dtype == torch.int8:
        return kernels.KV_INT8.value
    if dtype == torch.float8_e4m3fn:
        return (kernels.KV_FP8 if arch >= 90 else kernels.KV_FP8_BITS).value
    return kernels.KV_PLAIN.value


def as_bytes(cache: torch.Tensor) -> torch.Tensor:
    """float8 as its bits: not every architecture's Triton knows the type."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def _check_strides(call: AttentionCall, rows: int) -> None:
    """Offsets within a tile or a page are 32 bits wide in the kernel; those of tokens and pages are 64."""
    for name, tensor in (("q", call.q), ("out", call.out), ("k_cache", call.k_cache), ("v_cache", call.v_cache)):
        of_tile = tensor.ndim == 3
        reach = rows * tensor.stride(0) if of_tile else tensor.shape[1] * tensor.stride(1)
        reach += tensor.shape[-2] * tensor.stride(-2)
        if reach >= 2**31:
            raise ValueError(
                f"{name}'s strides {tensor.stride()} spread a {'tile' if of_tile else 'page'}'s rows over {reach} elements; "
                "the Triton backend reaches 2^31 - 1"
            )


def attention(call: AttentionCall) -> None:
    from sarathi_kernels.backends import triton_hybrid as kernels

    if call.work_items.shape[0] == 0:
        return
    num_kv_heads = call.k_cache.shape[2]
    tiles, constants = kernel_constants(
        call.q.shape[1], num_kv_heads, call.q.shape[2], call.k_cache.shape[1], call.q.dtype, call.k_cache.dtype,
        _arch(call.q.device), call.causal, call.window_left >= 0, call.softcap > 0,
    )  # fmt: skip
    _check_strides(call, tiles.prefill_rows)
    programs = min(_num_sms(call.q.device) * tiles.programs_per_sm, call.work_items.shape[0] * num_kv_heads)
    with _on(call.q.device):
        kernels.attention_kernel[(programs,)](
            call.q, as_bytes(call.k_cache), as_bytes(call.v_cache), call.out, call.lse, call.block_table, call.work_items,
            call.merge_items, call.counts, call.partial_out, call.partial_lse, call.counters,
            call.sinks, call.tree_mask, call.k_scale, call.v_scale,
            *call.q.stride()[:2], *call.out.stride()[:2], *call.k_cache.stride()[:3], *call.v_cache.stride()[:3],
            call.block_table.stride(0), call.q.shape[0], call.merge_items.shape[0],
            call.softmax_scale, call.softcap, call.window_left,
            **constants, num_warps=tiles.num_warps, maxnreg=tiles.max_registers,
        )  # fmt: skip


@functools.lru_cache(maxsize=None)
def kernel_constants(num_q_heads, num_kv_heads, head_dim, page_size, dtype, kv_dtype, arch, causal, window, softcap):
    """The table's row for a model on an architecture, and the compile-time arguments of `attention_kernel`."""
    spec = AttentionSpec(num_q_heads, num_kv_heads, head_dim, page_size=page_size, dtype=dtype, kv_dtype=kv_dtype)
    tiles = config.tiles(spec, arch)
    return tiles, dict(
        GROUP=spec.group, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, HEAD_PAD=config.head_pad(head_dim), PAGE_SIZE=page_size,
        CAUSAL=causal, WINDOW=window, SOFTCAP=softcap, KV=kv_kind(kv_dtype, arch), INTERPRET=config.interpreting(),
        PREFILL_ROWS=tiles.prefill_rows, PREFILL_KEYS=tiles.prefill_keys, PREFILL_STAGES=tiles.prefill_stages,
        DECODE_ROWS=config.decode_rows(spec, tiles), DECODE_KEYS=tiles.decode_keys, DECODE_STAGES=tiles.decode_stages,
    )  # fmt: skip


def _on(device: torch.device):
    """Triton launches on the current device."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def append_kv(call: AppendKvCall) -> None:
    from sarathi_kernels.backends import triton_cache as kernels

    if call.slot_mapping.shape[0] == 0:
        return
    device, (_, num_kv_heads, head_dim) = call.k.device, call.k.shape
    num_q_heads = 0 if call.q is None else call.q.shape[1]
    grid = (call.slot_mapping.shape[0], sum(-(-n // kernels.HEADS.value) for n in (num_kv_heads, num_q_heads)))
    with _on(device):
        kernels.append_kv_kernel[grid](
            call.k, call.v, as_bytes(call.k_cache), as_bytes(call.v_cache), call.slot_mapping, call.q, call.positions, call.cos_sin,
            call.k_scale, call.v_scale,
            *call.k.stride()[:2], *call.v.stride()[:2], *(call.q.stride()[:2] if num_q_heads else (0, 0)), *call.k_cache.stride()[:3], *call.v_cache.stride()[:3],
            **append_constants(num_q_heads, num_kv_heads, head_dim, call.k_cache.shape[1], call.k_cache.dtype,
                               0 if call.cos_sin is None else call.cos_sin.shape[1], _arch(device)),
        )  # fmt: skip


class DevicePlanner:
    """Plans on the device: the scratch for one AttentionPlan, and `run`."""

    def __init__(self, plan):
        from sarathi_kernels.backends import triton_planner

        self._planner = triton_planner.Planner(plan)

    def run(self, plan) -> None:
        with _on(plan.device):
            self._planner.run(plan)


def append_constants(num_q_heads, num_kv_heads, head_dim, page_size, kv_dtype, rotary_dim, arch) -> dict[str, int]:
    """Compile-time arguments of `append_kv_kernel`."""
    half, rest = rotary_dim // 2, head_dim - rotary_dim
    return dict(
        NUM_Q_HEADS=num_q_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, HEAD_PAD=config.head_pad(head_dim),
        PAGE_SIZE=page_size, HALF=half, HALF_PAD=config.head_pad(half), REST=rest, REST_PAD=config.head_pad(rest), KV=kv_kind(kv_dtype, arch),
    )  # fmt: skip


def merge_states(outs: torch.Tensor, lses: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    from sarathi_kernels.backends import triton_cache as kernels

    rows = lse.numel()
    if rows == 0:
        return
    with _on(out.device):
        kernels.merge_states_kernel[(-(-rows // kernels.STATE_ROWS.value),)](
            outs, lses, out, lse, rows, outs.shape[0], HEAD_DIM=outs.shape[-1], HEAD_PAD=config.head_pad(outs.shape[-1])
        )
