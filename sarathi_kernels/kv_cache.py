"""The paged KV cache: which slot a token lives in, and how new tokens get there.

    slot = page * page_size + offset        page = block_table[request, position // page_size], offset = position % page_size
"""

from __future__ import annotations

import torch

from sarathi_kernels import _native, backends
from sarathi_kernels.attention import LIBRARY, check_cache
from sarathi_kernels.backends import AppendKvCall, Problem
from sarathi_kernels.memory import empty_huge
from sarathi_kernels.plan import AttentionPlan
from sarathi_kernels.spec import AttentionSpec

LIBRARY.define(
    "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, Tensor(c!)? q, "
    "Tensor? positions, Tensor? cos_sin, Tensor(d!)? k_scale, Tensor(e!)? v_scale, str backend) -> ()"
)


def _run(*args) -> None:
    backends.get(args[-1]).append_kv(AppendKvCall(*args[:-1]))


LIBRARY.impl("append_kv", _run, "CompositeExplicitAutograd")
torch.library.register_fake("sarathi::append_kv", lambda *args: None, lib=LIBRARY)


def empty_kv_cache(spec: AttentionSpec, num_pages: int, *, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """(k_cache, v_cache) of one layer, uninitialised, each [num_pages, page_size, num_kv_heads, head_dim] in spec.kv_dtype.

    On the CPU they lie on huge pages where the system grants them: pages of a cache are read in random order, and translations
    of 4 KiB cost a fifth of the bandwidth (README of bench). Any other tensor of this shape works too.
    """
    shape, device = spec.kv_cache_shape(num_pages), torch.device(device)
    if device.type == "cpu":
        return empty_huge(shape, spec.kv_dtype), empty_huge(shape, spec.kv_dtype)
    return torch.empty(shape, dtype=spec.kv_dtype, device=device), torch.empty(shape, dtype=spec.kv_dtype, device=device)


def token_positions(plan: AttentionPlan) -> torch.Tensor:
    """Position of each query token in its request's sequence, [total_q] int32: kv_len - q_len + t."""
    shift = plan.seqused_k - plan.cu_seqlens_q[1:]
    return torch.arange(plan.total_q, dtype=torch.int32, device=plan.device) + shift[_request_of_token(plan)]


def slot_mapping(plan: AttentionPlan) -> torch.Tensor:
    """Slot of each query token, [total_q] int64: where `append_kv` puts its key and value.

    A token at a negative position (q_len longer than kv_len) has no slot: -1.
    """
    position = token_positions(plan).to(torch.int64)
    page_size = plan.spec.page_size
    page = plan.block_table[_request_of_token(plan), position.clamp(min=0) // page_size].to(torch.int64)
    return torch.where(position >= 0, page * page_size + position % page_size, -1)


def _request_of_token(plan: AttentionPlan) -> torch.Tensor:
    return torch.repeat_interleave(plan.cu_seqlens_q.diff(), output_size=plan.total_q)


def append_kv(
    spec: AttentionSpec,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    q: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    cos_sin: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Writes new keys and values into their pages; with `cos_sin`, rotates keys (and `q`, in place) on the way.

    Args:
        spec: the model's attention.
        k, v: [num_tokens, num_kv_heads, head_dim] in spec.dtype, innermost stride 1.
        k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim] in spec.kv_dtype, written in place.
        slot_mapping: [num_tokens] int64, page * page_size + offset; -1 skips the token (its q is still rotated).
        q: [num_tokens, num_q_heads, head_dim], rotated in place; only with `cos_sin`.
        positions: [num_tokens] int32, row of `cos_sin` for each token; required with `cos_sin`.
        cos_sin: [max_position, rotary_dim] float32, cosines in the first half of each row, sines in the second. Rotates
            elements i and i + rotary_dim / 2 of each head as a pair; elements from rotary_dim on stay as they are.
        k_scale, v_scale: scales of a quantized cache: written for int8 (max |x| / 127 per token and head), read for
            float8 (the stored value is x / scale, saturated).
        backend: "auto" or a backend's name.

    Raises:
        ValueError: a shape, dtype or device is wrong, or (checked on CPU tensors) a slot or position is out of range. Nothing is
            written then.
    """
    n = slot_mapping.shape[0]
    for name, tensor in (("k", k), ("v", v)):
        want = (n, spec.num_kv_heads, spec.head_dim)
        if tensor.shape != want or tensor.dtype != spec.dtype or tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} must be {spec.dtype} of shape {want} (num_tokens, num_kv_heads, head_dim) with innermost stride 1, "
                f"got {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
    check_cache(spec, k_cache, v_cache, k_scale, v_scale)
    if slot_mapping.ndim != 1 or slot_mapping.dtype != torch.int64 or not slot_mapping.is_contiguous():
        raise ValueError(f"slot_mapping must be 1-D contiguous int64, got {slot_mapping.dtype} of shape {tuple(slot_mapping.shape)}")
    if (positions is None) != (cos_sin is None) or (q is not None and cos_sin is None):
        given = [name for name, t in (("q", q), ("positions", positions), ("cos_sin", cos_sin)) if t is not None]
        raise ValueError(f"rotary embedding needs positions and cos_sin together (q is optional), got {', '.join(given)}")
    if cos_sin is not None:
        rotary_dim = cos_sin.shape[-1]
        if cos_sin.ndim != 2 or cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous() or rotary_dim % 2 or rotary_dim > spec.head_dim:
            raise ValueError(
                f"cos_sin must be contiguous float32 of shape (max_position, rotary_dim), rotary_dim even and at most head_dim "
                f"{spec.head_dim}, got {cos_sin.dtype} {tuple(cos_sin.shape)}"
            )
        if positions.shape != (n,) or positions.dtype != torch.int32 or not positions.is_contiguous():
            raise ValueError(f"positions must be contiguous int32 of shape ({n},), got {positions.dtype} {tuple(positions.shape)}")
    if q is not None:
        want = (n, spec.num_q_heads, spec.head_dim)
        if q.shape != want or q.dtype != spec.dtype or q.stride(-1) != 1:
            raise ValueError(f"q must be {spec.dtype} of shape {want} with innermost stride 1, got {q.dtype} {tuple(q.shape)} with strides {q.stride()}")
    for name, tensor in (("k", k), ("v", v), ("slot_mapping", slot_mapping), ("q", q), ("positions", positions), ("cos_sin", cos_sin)):
        if tensor is not None and tensor.device != k_cache.device:
            raise ValueError(f"{name} is on {tensor.device}, k_cache on {k_cache.device}")
    if k_cache.device.type == "cpu" and n:
        _check_range("slot_mapping", slot_mapping, -1, k_cache.shape[0] * spec.page_size - 1)
        if positions is not None:
            _check_range("positions", positions, 0, cos_sin.shape[0] - 1)
    name = backends.select(Problem(spec, k_cache.device), backend)
    torch.ops.sarathi.append_kv(k, v, k_cache, v_cache, slot_mapping, q, positions, cos_sin, k_scale, v_scale, name)


def _check_range(name: str, values: torch.Tensor, low: int, high: int) -> None:
    smallest, largest = _native.value_range(values.data_ptr(), values.shape[0], values.itemsize)  # torch.aminmax is slow when cold
    if smallest < low or largest > high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got values from {smallest} to {largest}")
