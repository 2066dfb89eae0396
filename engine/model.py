"""The Llama family: RMSNorm, rotary GQA attention over the paged cache, SwiGLU, a head that may be the embedding."""

from __future__ import annotations

import itertools

import sarathi_kernels as sk
import torch

from engine.batch import StepInput
from engine.linear import make_linear
from engine.weights import LayerWeights, ModelConfig, Weights


class Layer:
    """One layer's weights, laid out for the machine."""

    def __init__(self, weights: LayerWeights, eps: float, kind: str):
        self.qkv = make_linear(weights.qkv, kind, norm=weights.attention_norm, eps=eps)
        self.o = make_linear(weights.o, kind)
        self.gate_up = make_linear(weights.gate_up, kind, norm=weights.mlp_norm, eps=eps, swiglu=True)
        self.down = make_linear(weights.down, kind)


class Model:
    """A decoder and its KV cache.

    Args:
        weights: from `load_weights`.
        page_size: tokens per page of the cache.
        num_pages: pages of the cache.
        max_model_len: largest number of positions.
        linear: kind of the linear layers.
    """

    def __init__(self, weights: Weights, *, page_size: int, num_pages: int, max_model_len: int, linear: str = "dense"):
        config = weights.config
        self.config, self.dtype = config, weights.embedding.dtype
        self.spec = sk.AttentionSpec(
            num_q_heads=config.num_q_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            page_size=page_size,
            dtype=self.dtype,
        )
        self.embedding = weights.embedding
        self.layers = [Layer(layer, config.rms_eps, linear) for layer in weights.layers]
        self.head = make_linear(weights.head, norm=weights.norm, eps=config.rms_eps)
        self.cos_sin = rotary_table(config, max_model_len)
        # (k_cache, v_cache) of each layer. Unused slots are never read, but cleared: the system hands out memory when it is first
        # written, and a step that pays for that keeps streams waiting a quarter of a second.
        self.kv_caches = [sk.empty_kv_cache(self.spec, num_pages) for _ in self.layers]
        for cache in itertools.chain(*self.kv_caches):
            cache.zero_()
        self.decoder = self._decoder()

    def _decoder(self) -> sk.Decoder | None:
        """The whole step as one native call, where every layer has a native kernel; `__call__` does the same in single ops."""
        layers = [sk.DecoderLayer(layer.qkv, layer.o, layer.gate_up, layer.down) for layer in self.layers]
        if not all(isinstance(linear, sk.PackedLinear) for linear in (self.head, *itertools.chain(*layers))):
            return None
        return sk.Decoder(self.spec, self.embedding, layers, self.head, self.kv_caches, self.cos_sin)

    def __call__(self, step: StepInput) -> torch.Tensor:
        """One step. Puts the step's keys and values into the cache.

        Returns:
            Logits [num_samples, vocab_size] of the rows in `step.logit_rows`, valid until the next step.
        """
        if self.decoder is not None and step.plan.backend == "cpu":
            return self.decoder(step.input_ids, step.positions, step.slot_mapping, step.plan, step.logit_rows)
        x = self.embedding[step.input_ids]
        attended = torch.empty((len(x), self.spec.num_q_heads, self.spec.head_dim), dtype=self.dtype)
        for i, layer in enumerate(self.layers):
            self._attend(layer, *self.kv_caches[i], x, step, attended)
            mixed = attended.view(len(x), -1)
            if i + 1 == len(self.layers):  # from here on only rows that give logits matter
                x, mixed = x[step.logit_rows], mixed[step.logit_rows]
            layer.o(mixed, add_to=x)
            layer.down(layer.gate_up(x), add_to=x)
        return self.head(x)

    def _attend(
        self, layer: Layer, k_cache: torch.Tensor, v_cache: torch.Tensor, x: torch.Tensor, step: StepInput, out: torch.Tensor
    ) -> None:
        spec = self.spec
        qkv = layer.qkv(x).view(len(x), -1, spec.head_dim)
        q, k, v = qkv.split((spec.num_q_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1)
        sk.append_kv(
            spec, k, v, k_cache, v_cache, step.slot_mapping,
            q=q, positions=step.positions, cos_sin=self.cos_sin, backend=step.plan.backend,
        )  # fmt: skip
        sk.attention(q, k_cache, v_cache, step.plan, out=out)


def rotary_table(config: ModelConfig, max_model_len: int) -> torch.Tensor:
    """[max_model_len, head_dim] float32: cosines of position times frequency in the first half, sines in the second."""
    frequency = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
    if config.rope_scale is not None:
        frequency = frequency / config.rope_scale.double()
    angle = torch.outer(torch.arange(max_model_len, dtype=torch.float64), frequency)
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float()
