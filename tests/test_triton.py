"""The Triton backend without Triton's kernels: when it says no, and why; what it plans for."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import sarathi_kernels as sk
from sarathi_kernels.backends import Problem, triton_attention, triton_config
from sarathi_kernels.testing import make_spec

interpreting = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="asks what happens without the interpreter")
CUDA = torch.device("cuda:0")


def reason(spec, device):
    return triton_attention.supports(Problem(spec, torch.device(device)))


@interpreting
def test_cpu_tensors_need_the_interpreter():
    assert "TRITON_INTERPRET=1" in reason(make_spec(), "cpu")
    batch = (torch.tensor([0, 1], dtype=torch.int32), torch.tensor([1], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="backend 'triton' cannot: .*TRITON_INTERPRET=1.*Backends that can: .*reference"):
        sk.plan(make_spec(), *batch, backend="triton")


@interpreting
@pytest.mark.parametrize(
    "spec, text",
    [
        (make_spec(dtype=torch.float64), "dtype must be float32, bfloat16 or float16, not float64"),
        (make_spec(head_dim=512), "head_dim must be at most 256, not 512"),
        (make_spec(kv_dtype=torch.int8), "a quantized cache wants 16-bit queries"),
    ],
)
def test_unsupported_specs_say_why(spec, text, monkeypatch):
    monkeypatch.setattr(triton_attention.importlib.util, "find_spec", lambda name: object())
    assert text in reason(spec, CUDA)


@interpreting
@pytest.mark.parametrize(
    "capability, shared, text",
    [
        ((7, 5), 64 << 10, "no tile sizes for sm_75; there are sm_80, sm_90"),
        ((12, 0), 99 << 10, "no tile sizes for sm_120"),
        ((8, 0), 163 << 10, None),
        ((8, 6), 99 << 10, None),
        ((8, 6), 48 << 10, "its tiles need 65536 bytes of shared memory, the device has 49152 per block"),
        ((9, 0), 227 << 10, None),
    ],
)
def test_devices(capability, shared, text, monkeypatch):
    monkeypatch.setattr(triton_attention.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(shared_memory_per_block_optin=shared))
    said = reason(make_spec((8, 2), 128, dtype=torch.bfloat16), CUDA)
    assert said is None if text is None else text in said


def test_imports_without_triton():
    program = (
        "import sys, torch; sys.modules['triton'] = None\n"
        "from sarathi_kernels import AttentionSpec, backends\n"
        "print(backends.get('triton').supports(backends.Problem(AttentionSpec(1, 1, 64), torch.device('cpu'))))"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "triton is not installed", done.stderr


@pytest.mark.parametrize("heads, rows", [((8, 8), 16), ((28, 4), 16), ((16, 1), 16), ((24, 1), 32), ((32, 1), 32), ((40, 1), 16)], ids=str)
def test_decode_tiles_hold_a_tokens_heads(heads, rows):
    tiles = triton_config.tiles(make_spec(heads, 128, dtype=torch.bfloat16), 90)
    assert triton_config.decode_rows(make_spec(heads, 128), tiles) == rows


@pytest.mark.parametrize("key", triton_config.TABLE, ids=str)
def test_table_is_sound(key):
    tiles = triton_config.TABLE[key]
    for name in ("prefill_rows", "prefill_keys", "decode_keys", "num_warps"):
        value = getattr(tiles, name)
        assert value > 0 and value & (value - 1) == 0, f"{name} must be a power of two, got {value}"
    # Blocks of keys start at absolute multiples of their length, splits too: no block may straddle two splits.
    assert tiles.decode_split % tiles.decode_keys == 0 and tiles.prefill_split % tiles.prefill_keys == 0
