"""A decoder's step as a single native call, for the CPU backend and packed linear layers.

What it computes is what these ops compute one after another; only the time between them is gone:

    x = embedding[input_ids]
    qkv = layer.qkv(x)             append_kv(k, v, with q rotated)          attended = attention(q)      every layer
    x += layer.o(attended)         x += layer.down(layer.gate_up(x))        logits = head(x)
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch

from sarathi_kernels import _native
from sarathi_kernels.backends import AppendKvCall, AttentionCall, cpu
from sarathi_kernels.linear import ADD, FLOAT, STORE, SWIGLU, PackedLinear
from sarathi_kernels.plan import AttentionPlan, Workspace
from sarathi_kernels.spec import AttentionSpec

_PARAMS = struct.Struct("@4P 4i 0q")  # DecoderParams in csrc/cpu/decoder.h


class DecoderLayer(NamedTuple):
    """One layer: qkv and gate_up with their RMSNorms, gate_up with SwiGLU."""

    qkv: PackedLinear
    o: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear


class Decoder:
    """A model of layers of one shape.

    Args:
        spec: the layers' attention: bfloat16, cache too, without sinks.
        embedding: [vocab, hidden] bfloat16, contiguous.
        layers: first to last.
        head: with the last norm, [vocab, hidden].
        kv_caches: (k_cache, v_cache) of each layer, as `empty_kv_cache` makes them; all of the same shape and strides.
        cos_sin: as for `append_kv`.

    Raises:
        ValueError: the layers' caches differ in dtype, shape or strides, or are not one pair per layer.
    """

    def __init__(
        self, spec: AttentionSpec, embedding: torch.Tensor, layers: Sequence[DecoderLayer], head: PackedLinear,
        kv_caches: Sequence[tuple[torch.Tensor, torch.Tensor]], cos_sin: torch.Tensor,
    ):  # fmt: skip
        if len(kv_caches) != len(layers):
            raise ValueError(f"{len(layers)} layers need as many pairs of caches, got {len(kv_caches)}")
        kinds = {tuple((c.dtype, c.shape, c.stride()) for c in pair) for pair in kv_caches}
        if len(kinds) != 1 or any(c.dtype != torch.bfloat16 for c in kv_caches[0]):
            raise ValueError(f"every layer's caches must be bfloat16 and alike in shape and strides, got {sorted(map(str, kinds))}")
        self.spec, self.embedding, self.layers, self.head, self.cos_sin = spec, embedding, list(layers), head, cos_sin
        self.kv_caches = list(kv_caches)
        rows = [[a for linear in layer for a in linear.addresses()] + [c.data_ptr() for c in pair] for layer, pair in zip(layers, kv_caches)]
        self._table = torch.tensor(rows, dtype=torch.int64)  # DecoderLayer in csrc/cpu/decoder.h
        self._workspace = Workspace()

    def __call__(
        self, input_ids: torch.Tensor, positions: torch.Tensor, slot_mapping: torch.Tensor, plan: AttentionPlan, logit_rows: torch.Tensor
    ) -> torch.Tensor:
        """One step. Values are trusted, not checked: ids within the vocabulary, positions and slots as for `append_kv`.

        Args:
            input_ids, positions: [tokens] int32.
            slot_mapping: [tokens] int64.
            plan: made for the CPU backend.
            logit_rows: [num_logits] int64, ascending: the tokens whose logits are wanted.

        Returns:
            [num_logits, vocab] float32, valid until the next call.
        """
        spec, first, head, tokens = self.spec, self.layers[0], self.head, len(input_ids)
        x, qkv = self._take("x", tokens, head.in_features), self._take("qkv", tokens, first.qkv.out_features)
        attended, hidden = self._take("attended", tokens, first.o.in_features), self._take("hidden", tokens, first.down.in_features)
        logits = self._take("logits", len(logit_rows), head.out_features, torch.float32)
        q, k, v = qkv.view(tokens, -1, spec.head_dim).split((spec.num_q_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1)
        k_cache, v_cache = self.kv_caches[0]
        append = AppendKvCall(k, v, k_cache, v_cache, slot_mapping, q, positions, self.cos_sin, None, None)
        attention = AttentionCall(
            q, k_cache, v_cache, attended.view(tokens, -1, spec.head_dim), None,
            plan.cu_seqlens_q, plan.seqused_k, plan.block_table, plan.work_items, plan.merge_items, plan.counts,
            plan.partial_out, plan.partial_lse, plan.counters,
            None, None, None, None, spec.softmax_scale, spec.softcap, spec.causal, spec.window_left,
        )  # fmt: skip
        _native.cpu_decoder(
            _PARAMS.pack(
                self.embedding.data_ptr(), input_ids.data_ptr(), logit_rows.data_ptr(), self._table.data_ptr(),
                tokens, head.in_features, len(logit_rows), len(self.layers),
            ),
            first.qkv.pack(x, qkv, STORE), first.o.pack(attended, x, ADD), first.gate_up.pack(x, hidden, SWIGLU),
            first.down.pack(hidden, x, ADD), head.pack(x, logits, FLOAT),
            cpu.pack_append_kv(append), cpu.pack_attention(attention), torch.get_num_threads(),
        )  # fmt: skip
        return logits

    def _take(self, name: str, rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return self._workspace.take(name, (rows, width), dtype, self.embedding.device)
