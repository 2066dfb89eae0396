"""Two file formats, one model: GGUF and safetensors give equal weights; what is not supported is refused by name."""

import dataclasses
import json

import gguf
import pytest
import torch
from engine.weights import LayerWeights, ModelConfig, find_model, load_weights, rope_scale, rotate_half_rows, save_weights
from safetensors.torch import save_file

CONFIG = ModelConfig(
    vocab_size=96, hidden_size=64, num_layers=2, num_q_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=160,
    max_model_len=128, rope_theta=5e4, rms_eps=1e-6,
)  # fmt: skip
SHAPES = {
    "attention_norm": (64,), "q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64), "mlp_norm": (64,),
    "gate": (160, 64), "up": (160, 64), "down": (64, 160),
}  # fmt: skip


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    names = {f"{i}.{n}": shape for i in range(CONFIG.num_layers) for n, shape in SHAPES.items()}
    return {name: torch.randn(shape) for name, shape in {**names, "embedding": (96, 64), "norm": (64,), "head": (96, 64)}.items()}


def write_safetensors(path, tensors, shards=1, tied=False, **extra):
    inner = {
        "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
        "down": "mlp.down_proj", **{n: f"self_attn.{n}_proj" for n in "qkvo"},
    }  # fmt: skip
    outer = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
    named = {}
    for name, value in tensors.items():
        layer, _, short = name.rpartition(".")
        if name != "head" or not tied:
            named[f"model.layers.{layer}.{inner[short]}.weight" if layer else outer[name]] = value
    if shards == 1:
        save_file(named, path / "model.safetensors")
    else:
        files = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(named)}
        for file in set(files.values()):
            save_file({n: named[n] for n, f in files.items() if f == file}, path / file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 160, "max_position_embeddings": 128, "rope_theta": 5e4, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config | extra))


def neighbours(weight, heads):
    """GGUF's row order of q and k: rotary pairs side by side."""
    return weight.view(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def write_gguf(path, tensors, tied=False):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128), writer.add_embedding_length(64), writer.add_block_count(2), writer.add_feed_forward_length(160)
    writer.add_head_count(4), writer.add_head_count_kv(2), writer.add_rope_freq_base(5e4), writer.add_layer_norm_rms_eps(1e-6)
    inner = {
        "attention_norm": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "mlp_norm": "ffn_norm",
        "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
    }  # fmt: skip
    outer = {"embedding": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}
    for name, value in tensors.items():
        layer, _, short = name.rpartition(".")
        if short in ("q", "k"):
            value = neighbours(value, 4 if short == "q" else 2)
        if name != "head" or not tied:
            writer.add_tensor(f"blk.{layer}.{inner[short]}.weight" if layer else outer[name], value.numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()


def same(left, right):
    assert dataclasses.replace(left.config, rms_eps=0) == dataclasses.replace(right.config, rms_eps=0)
    assert left.config.rms_eps == pytest.approx(right.config.rms_eps)
    for name in ("embedding", "norm", "head"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    for i, (a, b) in enumerate(zip(left.layers, right.layers, strict=True)):
        for field in dataclasses.fields(LayerWeights):
            assert torch.equal(getattr(a, field.name), getattr(b, field.name)), (i, field.name)


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_and_safetensors_give_the_same_model(tmp_path, tensors, tied):
    write_safetensors(tmp_path, tensors, tied=tied)
    write_gguf(tmp_path / "m.gguf", tensors, tied=tied)
    left, right = load_weights(tmp_path, torch.float32), load_weights(tmp_path / "m.gguf", torch.float32)
    same(left, right)
    assert left.config == CONFIG
    assert torch.equal(left.layers[1].qkv, torch.cat([tensors["1.q"], tensors["1.k"], tensors["1.v"]]))
    assert torch.equal(left.layers[0].gate_up, torch.cat([tensors["0.gate"], tensors["0.up"]]))
    assert (left.head is left.embedding) == tied and (right.head is right.embedding) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_comes_back(tmp_path, tensors, tied):
    written, saved = tmp_path / "written", tmp_path / "saved"
    written.mkdir()
    write_safetensors(written, tensors, tied=tied)
    model = load_weights(written, torch.bfloat16)
    save_weights(model, saved, bos=1, eos=2)
    again = load_weights(saved, torch.bfloat16)
    same(model, again)
    assert again.config == model.config and (again.head is again.embedding) == tied
    assert json.loads((saved / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_model_that_config_json_cannot_describe_is_not_saved(tmp_path, tensors):
    write_safetensors(tmp_path, tensors, rope_scaling={"rope_type": "linear", "factor": 2.0})
    with pytest.raises(ValueError, match="scaled rotary frequencies"):
        save_weights(load_weights(tmp_path, torch.float32), tmp_path / "saved", bos=1, eos=2)
    assert not (tmp_path / "saved").exists()


def test_shards_are_found_through_the_index(tmp_path, tensors):
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir(), many.mkdir()
    write_safetensors(one, tensors), write_safetensors(many, tensors, shards=3)
    same(load_weights(one, torch.float32), load_weights(many, torch.float32))


def test_rows_of_q_and_k_come_back_from_ggufs_order():
    weight = torch.arange(24.0).view(12, 2)
    assert torch.equal(rotate_half_rows(neighbours(weight, 3), 3), weight)
    assert not torch.equal(neighbours(weight, 3), weight)


def test_dtype_is_as_asked(tmp_path, tensors):
    write_safetensors(tmp_path, tensors)
    loaded = load_weights(tmp_path, torch.bfloat16)
    assert {loaded.head.dtype, loaded.norm.dtype, loaded.layers[0].down.dtype} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel; supported are LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"sliding_window": 64}, "sliding_window = 64"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope scaling 'yarn'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, tensors, extra, message):
    write_safetensors(tmp_path, tensors, **extra)
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path, torch.float32)


def test_a_missing_tensor_is_named(tmp_path, tensors):
    del tensors["1.up"]
    write_safetensors(tmp_path, tensors)
    with pytest.raises(ValueError, match="lacks the tensor model.layers.1.mlp.up_proj.weight"):
        load_weights(tmp_path, torch.float32)


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model at 'nowhere'"):
        find_model("nowhere")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="neither a GGUF file nor a directory"):
        load_weights(tmp_path / "x.bin", torch.float32)


def test_llama3_scaling_keeps_fast_rotations_and_slows_the_slow_ones():
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    scale = rope_scale(rope, 5e5, 128)
    assert scale.shape == (64,) and scale[0] == 1 and scale[-1] == 8
    assert (scale.diff() >= 0).all() and ((scale > 1) & (scale < 8)).any()
    assert torch.equal(rope_scale({"type": "linear", "factor": 2}, 1e4, 8), torch.full((4,), 2.0))
    assert rope_scale({}, 1e4, 8) is None
