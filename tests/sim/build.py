"""Builds the simulator's modules with the project's CMake, in a tree of their own, and imports them.

    sim = build.module("_sim")           the CUDA kernels of csrc/cuda, compiled by g++
    tests = build.module("_sim_tests")   the test kernels of this folder
    build.module("_sim_tests", ucontext=True)   on the fibers of machines that are not x86-64
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import numpy as np
import pybind11

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "build" / f"{sys.implementation.cache_tag}-sim"


@contextlib.contextmanager
def _alone():
    """One process at a time: ninja's records do not survive two builds in one tree."""
    TREE.mkdir(parents=True, exist_ok=True)
    with (TREE / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.lru_cache
def configure(ucontext: bool = False) -> Path:
    """Runs CMake once per process. Returns its tree. ninja and cmake may come from the environment of this interpreter."""
    tree = TREE.with_name(TREE.name + "-ucontext") if ucontext else TREE
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    command = [
        shutil.which("cmake", path=path) or "cmake", "-S", str(ROOT), "-B", str(tree), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DSARATHI_OUTPUT={tree / 'out'}", "-DSARATHI_SIM=ON", f"-DSARATHI_SIM_UCONTEXT={'ON' if ucontext else 'OFF'}", "-DSARATHI_CUDA=OFF",
    ]  # fmt: skip
    if ninja := shutil.which("ninja", path=path):
        command.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
    _run(command)
    return tree


@functools.lru_cache
def module(name: str, ucontext: bool = False) -> ModuleType:
    """Builds the target `name` (a moment when nothing changed) and imports it.

    Raises:
        RuntimeError: it does not compile; the message is the compiler's.
    """
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    with _alone():
        tree = configure(ucontext)
        _run([shutil.which("cmake", path=path) or "cmake", "--build", str(tree), "--target", name])
    file = tree / "out" / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location(name, file)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def nvcc() -> str | None:
    """The CUDA compiler, if there is one."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def gpu_library(source: str, arch: str, folder: Path) -> ctypes.CDLL:
    """A .cu file of this folder compiled for `arch` ("sm_80") into `folder` and loaded. Needs nvcc, but no GPU.

    Raises:
        RuntimeError: it does not compile; the message is the compiler's.
    """
    number = arch.removeprefix("sm_")
    file = folder / f"{Path(source).stem}.so"
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'sim'}"]
    flags = ["-std=c++17", "-O2", f"-gencode=arch=compute_{number},code=sm_{number}", "-shared", "-Xcompiler=-fPIC", "-cudart=static"]
    _run([nvcc(), *flags, *include, str(ROOT / "tests" / "sim" / source), "-o", str(file)])
    return ctypes.CDLL(str(file))


def call_gpu(function, name: str, inputs: list[np.ndarray], out: np.ndarray, n, *rest) -> None:
    """Calls a test function of a gpu_library: numpy arrays in, `out` overwritten; `rest` are its further arguments.

    Raises:
        RuntimeError: it returned an error code.
    """
    inputs = [np.ascontiguousarray(x) for x in inputs]
    pointers = (ctypes.c_void_p * 3)(*(x.ctypes.data for x in inputs))
    sizes = (ctypes.c_size_t * 3)(*(x.nbytes for x in inputs))
    out_arguments = ctypes.c_void_p(out.ctypes.data), ctypes.c_size_t(out.nbytes)
    error = function(name.encode(), pointers, sizes, len(inputs), *out_arguments, (ctypes.c_int * 4)(*n), *rest)
    if error != 0:
        raise RuntimeError(f"{name} on the GPU returned {error}")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
