"""The backends, in order of preference. Each is a module with `supports`, `plan_config` and the three ops.

    supports(problem) -> None, or the reason why not
    plan_config(spec) -> PlanConfig
    attention(call: AttentionCall) -> None          writes call.out and call.lse
    append_kv(call: AppendKvCall) -> None           writes the caches (and call.q, call.k_scale, call.v_scale)
    merge_states(outs, lses, out, lse) -> None
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import NamedTuple

import torch

from sarathi_kernels.spec import AttentionSpec

NAMES = ("cuda", "triton", "cpu", "reference")
# The oracle is chosen only by name: slow is not something to fall into unawares.
AUTO = ("cuda", "triton", "cpu")
ENVIRONMENT = "SARATHI_BACKEND"


class Problem(NamedTuple):
    """What a backend is asked to support."""

    spec: AttentionSpec
    device: torch.device


class PlanConfig(NamedTuple):
    """A backend's tile heights (packed rows) and split lengths (keys) for one spec. Never depends on the batch."""

    decode_rows: int
    prefill_rows: int
    decode_split: int
    prefill_split: int


class AttentionCall(NamedTuple):
    """Arguments of one attention call, checked. Shapes and meaning as in csrc/params.h, AttentionParams."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor | None
    cu_seqlens_q: torch.Tensor
    seqused_k: torch.Tensor
    block_table: torch.Tensor
    work_items: torch.Tensor
    merge_items: torch.Tensor
    counts: torch.Tensor
    partial_out: torch.Tensor
    partial_lse: torch.Tensor
    counters: torch.Tensor
    sinks: torch.Tensor | None
    tree_mask: torch.Tensor | None
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    softmax_scale: float
    softcap: float
    causal: bool
    window_left: int


class AppendKvCall(NamedTuple):
    """Arguments of one append_kv call, checked. Shapes and meaning as in csrc/params.h, AppendKvParams."""

    k: torch.Tensor
    v: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    slot_mapping: torch.Tensor
    q: torch.Tensor | None
    positions: torch.Tensor | None
    cos_sin: torch.Tensor | None
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None


@functools.cache
def get(name: str) -> ModuleType:
    """The backend's module. A backend whose toolchain is missing still imports; `supports` then says what is missing."""
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(NAMES)}")
    return importlib.import_module(f"sarathi_kernels.backends.{_MODULES.get(name, name)}")


_MODULES = {"triton": "triton_attention"}


def backend_reasons(spec: AttentionSpec, device: torch.device | str = "cpu") -> dict[str, str | None]:
    """For every backend, None if it supports the spec on the device, else why not."""
    problem = Problem(spec, torch.device(device))
    return {name: get(name).supports(problem) for name in NAMES}


def select(problem: Problem, backend: str = "auto") -> str:
    """The backend to use: the one named (or named by SARATHI_BACKEND), else the first that supports the problem.

    Raises:
        ValueError: the named backend does not support the problem (its reason, and the backends that do), or none does.
    """
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT, "auto")
    if backend != "auto":
        reason = get(backend).supports(problem)
        if reason is None:
            return backend
        able = [name for name, why in backend_reasons(*problem).items() if why is None]
        raise ValueError(f"backend {backend!r} cannot: {reason}. Backends that can: {', '.join(able) or 'none'}")
    for name in AUTO:
        if get(name).supports(problem) is None:
            return name
    lines = "; ".join(f"{name}: {why or 'can, if named'}" for name, why in backend_reasons(*problem).items())
    raise ValueError(f"no backend supports this on {problem.device}: {lines}")


def select_for(device: torch.device, dtype: torch.dtype, backend: str = "auto") -> str:
    """Like `select`, for an op that has no spec (`merge_states`): any backend that serves the dtype on the device."""
    return select(Problem(AttentionSpec(1, 1, 64, dtype=dtype), device), backend)
