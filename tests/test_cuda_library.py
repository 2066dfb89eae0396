"""The CUDA library as built: it loads without a driver and says what is missing, and its machine code is what was meant."""

import re
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import cuda_sim
import pytest
import torch
from bench.gpu import kernel_resources

import sarathi_kernels as sk
from sarathi_kernels.backends import Problem, cuda
from sarathi_kernels.testing import Case, make_inputs, make_spec

LIBRARY = Path(sk.__file__).parent / "libsarathi_cuda.so"
needs_library = pytest.mark.skipif(cuda._cuda is None, reason=f"the CUDA library is not installed: {cuda.machine_reason()}")


@lru_cache
def cuobjdump() -> str | None:
    """NVIDIA's disassembler: of the toolkit, or the one that Triton brings along."""
    try:
        import triton.backends.nvidia as nvidia

        bundled = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    except ImportError:
        bundled = Path("cuobjdump")
    return shutil.which("cuobjdump") or (str(bundled) if bundled.exists() else None)


@lru_cache
def dump(*options) -> str:
    if cuobjdump() is None:
        pytest.skip("there is no cuobjdump, neither on PATH nor in the triton package")
    return subprocess.run([cuobjdump(), *options, str(LIBRARY)], capture_output=True, text=True, check=True).stdout


@lru_cache
def resources() -> dict[tuple[str, str], dict]:
    """{(arch, mangled kernel): registers, stack, spill_stores, spill_loads, smem}, from what ptxas -v said in the build."""
    report = LIBRARY.with_suffix(".ptxas")
    assert report.exists(), f"{report} is missing: CMakeLists.txt writes it beside the library (csrc/cuda/ptxas_log.py)"
    return {(use["arch"], use["symbol"]): use for use in kernel_resources(report.read_text())}


@needs_library
def test_every_gpu_is_served():
    """Machine code for sm_80 and sm_90a (`make gpu` builds for the GPU that is there), and PTX that a newer driver compiles."""
    archs = {arch for arch, _ in resources()}
    assert archs == {"sm_80", "sm_90a"} or cuda.machine_reason() is None
    in_library = set(re.findall(r"sm_\w+(?=\.cubin)", dump("--list-elf")))  # without the letter
    assert in_library == {arch.rstrip("a") for arch in archs}, "the report is not this library's"
    assert ".target sm_80" in dump("-ptx")


@needs_library
def test_no_kernel_spills():
    kernels = resources()
    per_arch = len(cuda.HEAD_DIMS) * len(cuda.DTYPES) + 4 + 4 + 1  # attention, append_kv, merge_states, plan
    for arch in {arch for arch, _ in kernels}:
        assert len([a for a, _ in kernels if a == arch]) == per_arch, arch
    for (arch, kernel), use in kernels.items():
        assert use["stack"] == use["spill_stores"] == use["spill_loads"] == 0, f"{kernel} on {arch} spills: {use}"
        assert use["smem"] == 0, f"{kernel} on {arch}: all shared memory is dynamic, got {use}"


@needs_library
def test_attention_leaves_room_for_two_ctas():
    """65536 registers of an SM over two CTAs of 128 threads, in the units of 8 registers in which a warp gets them."""
    attention = {key: use for key, use in resources().items() if "attention_kernel" in key[1]}
    assert len(attention) % (len(cuda.HEAD_DIMS) * len(cuda.DTYPES)) == 0 and attention
    for key, use in attention.items():
        assert -(-use["registers"] // 8) * 8 * 128 * cuda.CTAS_PER_SM <= 65536, key


@needs_library
def test_attention_uses_tensor_cores_and_asynchronous_copies():
    """Counted in the machine code: what a compiler or a slip would silently turn into something slower."""
    wanted = ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDSM.16.MT88.4", "LDSM.16.M88.4", "STL", "LDL")
    for arch in sorted({arch for arch, _ in resources()}):
        functions = [f for f in re.split(r"Function : ", dump("-sass", "-arch", arch))[1:] if "attention_kernel" in f.split()[0]]
        assert len(functions) == len(cuda.HEAD_DIMS) * len(cuda.DTYPES), arch
        for function in functions:
            name = function.split()[0]
            count = {op: len(re.findall(rf"\b{op}", function)) for op in wanted}
            assert count["HMMA.16816.F32"] >= 100 and count["LDGSTS.E.BYPASS.128"] >= 20, (arch, name, count)
            assert count["LDSM.16.MT88.4"] > 0 and count["LDSM.16.M88.4"] > 0, (arch, name, count)
            assert count["STL"] == count["LDL"] == 0, (arch, name, count)
            assert ("BF16" in function) == ("bfloat16" in name)


@needs_library
def test_the_library_needs_no_driver_and_no_torch():
    """cudart is inside; nothing of CUDA or torch is asked of the machine at load time."""
    needed = re.findall(r"NEEDED\)\s+Shared library: \[(\S+)\]", _readelf("-d"))
    assert needed and not [name for name in needed if re.search(r"cuda|torch|c10", name)], needed
    exported = {line.split()[-1] for line in _readelf("--dyn-syms", "-W").splitlines() if " GLOBAL DEFAULT " in line and " UND " not in line}
    assert exported == {name for name in exported if name.startswith("sarathi_cuda_")} and len(exported) >= 7, exported


def _readelf(*options) -> str:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("there is no readelf on PATH")
    return subprocess.run([readelf, *options, str(LIBRARY)], capture_output=True, text=True, check=True).stdout


def test_without_a_gpu_the_reason_is_true_and_others_serve():
    reason = cuda.machine_reason()
    if reason is None:
        pytest.skip("this machine has a CUDA device")
    spec = sk.AttentionSpec(4, 2, 64, dtype=torch.bfloat16)
    assert cuda.supports(Problem(spec, torch.device("cuda"))) == reason
    assert any(word in reason for word in ("library is not there", "no CUDA driver", "no CUDA device"))
    with pytest.raises(ValueError, match="backend 'cuda' cannot: .*Backends that can: .*reference"):
        sk.plan(
            spec, torch.tensor([0, 1], dtype=torch.int32), torch.ones(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32),
            backend="cuda",
        )  # fmt: skip


@needs_library
def test_a_launch_without_a_driver_raises_and_says_why():
    if cuda.machine_reason() is None:
        pytest.skip("this machine has a CUDA device")
    inputs = make_inputs(Case("one", ((1, 20),), make_spec()), torch.bfloat16)
    call = cuda_sim.attention_call(inputs)
    with pytest.raises(RuntimeError, match="set device: .*driver.* \\(CUDA error [1-9]"):
        cuda._cuda.AttentionPlan(cuda.attention_params(call), 1, 0)
    with pytest.raises(ValueError, match="argument block of 3 bytes, want 272"):
        cuda._cuda.AttentionPlan(b"abc", 1, 0)


def test_the_backend_imports_where_the_library_is_missing():
    """A CPU-only install: the module is there, the reason is given, nothing is raised."""
    code = (
        "import sys; sys.modules['sarathi_kernels._cuda'] = None\n"
        "import torch, sarathi_kernels as sk\n"
        "from sarathi_kernels.backends import Problem, cuda\n"
        "print(cuda.supports(Problem(sk.AttentionSpec(1, 1, 64, dtype=torch.bfloat16), torch.device('cuda'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "the CUDA library is not there" in done.stdout
