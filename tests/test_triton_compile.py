"""Every row of the Triton backend's table compiles for its architecture without spilling, within the SM's shared memory.

No GPU is needed. `python tests/test_triton_compile.py` prints the whole table.
"""

import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch

from sarathi_kernels import testing
from sarathi_kernels.backends import AppendKvCall, AttentionCall, triton_config
from sarathi_kernels.plan import Limits
from sarathi_kernels.testing import Case, make_spec

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the compiler and the interpreter do not live in one process", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent))
import triton_compile  # noqa: E402
from triton_compile import backend, compile_launch, recording  # noqa: E402

# Bytes of shared memory that a block can have, and registers of an SM.
SHARED = {80: 163 * 1024, 90: 227 * 1024}
REGISTERS = 65536
EVERYTHING = testing.FEATURES["everything"]


def attention_resources(arch, spec, tree=False):
    """Resources of the attention kernel that this spec launches."""
    case = Case("compile", ((4, 40), (1, 20)), spec, tree=tree)
    inputs = testing.make_inputs(case, spec.dtype)
    plan = inputs.plan("reference")
    fields = {f: getattr(inputs, f) for f in ("q", "k_cache", "v_cache", "cu_seqlens_q", "seqused_k", "block_table")}
    fields |= {f: getattr(plan, f) for f in ("work_items", "merge_items", "counts", "partial_out", "partial_lse", "counters")}
    fields |= {f: inputs.kwargs.get(f) for f in ("sinks", "tree_mask", "k_scale", "v_scale")}
    call = AttentionCall(
        out=torch.empty_like(inputs.q), lse=torch.empty(inputs.q.shape[:2]), softmax_scale=spec.softmax_scale, softcap=spec.softcap,
        causal=spec.causal, window_left=spec.window_left, **fields,
    )  # fmt: skip
    with recording(arch) as launches:
        backend.attention(call)
    return compile_launch(launches[0], arch)


def row_id(key):
    return "sm_{}-dim{}-q{}-kv{}".format(*key)


def specs_of(key):
    """(label, spec, tree) for the variants of a row of the table: plain and with every feature, at full and at padded head_dim."""
    arch, pad, q_bytes, kv_bytes = key
    dtype = torch.float32 if q_bytes == 4 else torch.bfloat16
    kv_dtypes = [dtype] if kv_bytes == q_bytes else [torch.float8_e4m3fn, torch.int8]
    for kv_dtype in kv_dtypes:
        spec = make_spec((8, 2), pad, dtype=dtype, kv_dtype=kv_dtype)
        yield "plain", spec, False
        yield "everything", dataclasses.replace(spec, **EVERYTHING), True
        if kv_bytes == q_bytes == 2 and pad > 64:
            yield "padded", dataclasses.replace(spec, head_dim=pad * 3 // 4), False


def assert_fits(resources, arch, key):
    assert resources.spilled == 0, f"{row_id(key)} spills {resources.spilled} bytes per thread"
    assert resources.shared <= SHARED[arch]
    assert resources.registers * 32 * resources.num_warps <= REGISTERS


@pytest.mark.parametrize("key", triton_config.TABLE, ids=row_id)
def test_rows_of_the_table_fit(key):
    largest = 0
    for _, spec, tree in specs_of(key):
        resources = attention_resources(key[0], spec, tree)
        assert_fits(resources, key[0], key)
        largest = max(largest, resources.shared)
        if key[0] == 90 and key[1:] in ((64, 2, 2), (128, 2, 2), (256, 2, 2)):
            assert "wgmma.mma_async" in resources.ptx, "prefill tiles on Hopper must use its tensor cores"
            assert "mma.sync" in resources.ptx, "decode tiles are too low for wgmma"
        if triton_config.TABLE[key].prefill_stages > 1:
            assert "cp.async" in resources.ptx, "loads of keys and values must be pipelined"
    assert largest == triton_config.TABLE[key].shared_bytes, f"shared_bytes of {row_id(key)} is out of date"


@pytest.mark.parametrize("arch", triton_config.ARCHS)
@pytest.mark.parametrize("page_size", [1, 5, 128])
def test_page_sizes_compile(page_size, arch):
    spec = make_spec((8, 2), 128, dtype=torch.float16, page_size=page_size)
    assert_fits(attention_resources(arch, spec), arch, (arch, 128, 2, 2))


@pytest.mark.parametrize("arch", triton_config.ARCHS)
@pytest.mark.parametrize("heads", [(28, 4), (24, 1), (40, 1), (8, 8)], ids=str)
def test_groups_compile(heads, arch):
    spec = make_spec(heads, 128, dtype=torch.bfloat16, causal=heads != (8, 8))
    assert_fits(attention_resources(arch, spec), arch, (arch, 128, 2, 2))


@pytest.mark.parametrize("arch", triton_config.ARCHS)
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_append_kv_compiles(kv_dtype, arch):
    spec = make_spec((28, 4), 80, dtype=torch.bfloat16, kv_dtype=kv_dtype)
    tokens = [torch.zeros(3, heads, 80, dtype=torch.bfloat16) for heads in (4, 4, 28)]
    caches = [torch.zeros(spec.kv_cache_shape(2), dtype=kv_dtype) for _ in range(2)]
    scales = [None, None] if spec.kv_scale_shape(2) is None else [torch.zeros(spec.kv_scale_shape(2)) for _ in range(2)]
    slots, positions = torch.arange(3), torch.arange(3, dtype=torch.int32)
    for rotary in ((tokens[2], positions, torch.zeros(9, 64)), (None, None, None)):
        with recording(arch) as launches:
            backend.append_kv(AppendKvCall(*tokens[:2], *caches, slots, *rotary, *scales))
        assert compile_launch(launches[0], arch).spilled == 0


@pytest.mark.parametrize("arch", triton_config.ARCHS)
def test_merge_states_compiles(arch):
    outs, lses = torch.zeros(3, 5, 2, 96, dtype=torch.bfloat16), torch.zeros(3, 5, 2)
    with recording(arch) as launches:
        backend.merge_states(outs, lses, outs[0], lses[0])
    assert compile_launch(launches[0], arch).spilled == 0


@pytest.mark.parametrize("arch", triton_config.ARCHS)
@pytest.mark.parametrize("features", [{}, {"causal": False, "window_left": 100}], ids=["causal", "window"])
def test_the_planner_compiles(features, arch):
    inputs = testing.make_inputs(Case("plan", ((3, 9), (1, 900), (70, 70)), make_spec(**features)), torch.bfloat16)
    plan = inputs.plan("reference")
    items, merges, rows = Limits(100).capacity(inputs.spec, plan.config, 3, 1000)
    roomy = dataclasses.replace(
        plan, work_items=torch.zeros(items, 12, dtype=torch.int32), merge_items=torch.zeros(merges, 8, dtype=torch.int32),
        partial_out=torch.zeros(rows, 1, 1),
    )  # fmt: skip
    with recording(arch) as launches:
        backend.DevicePlanner(roomy).run(roomy)
    assert len(launches) == 4
    for launch in launches:
        assert compile_launch(launch, arch).spilled == 0, launch.kernel


if __name__ == "__main__":
    print(f"{'row':24} {'variant':12} {'cache':16} registers  spilled   shared  {triton_compile.triton.__version__}")
    for key in triton_config.TABLE:
        for label, spec, tree in specs_of(key):
            r = attention_resources(key[0], spec, tree)
            print(f"{row_id(key):24} {label:12} {str(spec.kv_dtype)[6:]:16} {r.registers:9} {r.spilled:8} {r.shared:8}", flush=True)
