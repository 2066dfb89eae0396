"""Our layout arithmetic (csrc/cuda/fragment.cuh) is CuTe's: a file of static assertions, compiled by nvcc."""

import importlib.util
import subprocess
from pathlib import Path

import pytest
from sim import build

FOLDER = Path(__file__).parent


def cutlass_headers() -> Path | None:
    """Those of the nvidia-cutlass package, found without importing it: that would want its Python dependencies."""
    spec = importlib.util.find_spec("cutlass_library")
    return Path(spec.origin).parent / "source" / "include" if spec and spec.origin else None


PLANTS = [(0, None), (1, "swizzle"), (2, "A through"), (3, "B through"), (4, "B through"), (5, "accumulators")]


@pytest.mark.parametrize("plant, says", PLANTS)
def test_layouts_are_those_of_cute(plant, says, tmp_path):
    """plant: one of ours is off by one, which the assertions must see."""
    if build.nvcc() is None:
        pytest.skip("there is no nvcc")
    if cutlass_headers() is None:
        pytest.skip("the nvidia-cutlass package, for CuTe's headers, is not installed")
    flags = ["-std=c++17", "--expt-relaxed-constexpr", "-arch=sm_80", "-ptx", "-o", str(tmp_path / "layouts.ptx"), f"-DPLANT={plant}"]
    include = [f"-I{cutlass_headers()}", f"-I{FOLDER.parent / 'csrc'}"]
    done = subprocess.run([build.nvcc(), *flags, *include, str(FOLDER / "cuda_layouts.cu")], capture_output=True, text=True)
    if says is None:
        assert done.returncode == 0, done.stderr
    else:
        failed = [line for line in done.stderr.splitlines() if "static assertion failed" in line]
        assert failed and says in failed[0], done.stderr
