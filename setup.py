"""Builds the native modules with CMake and ninja, in one kept build tree, and packages them.

Environment: SARATHI_CUDA = auto (the default: where there is an nvcc) | on | off; SARATHI_CUDA_ARCHS = "80;90a"; MAX_JOBS; CMAKE_ARGS.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_nvcc():
    mode = os.environ.get("SARATHI_CUDA", "auto")
    if mode not in ("auto", "on", "off"):
        raise SystemExit(f"SARATHI_CUDA must be auto, on or off, got {mode!r}")
    if mode == "off":
        return None
    default = Path("/usr/local/cuda/bin/nvcc")
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or (str(default) if default.exists() else None)
    if mode == "on" and nvcc is None:
        raise SystemExit("SARATHI_CUDA=on, but there is no nvcc: put it on PATH or name it in CUDACXX")
    return nvcc


class CMakeBuild(build_ext):
    """One CMake run makes every module. The tree is kept in build/<tag>, so a second build is incremental."""

    built = None

    def build_extension(self, ext):
        if self.built is None:
            self.built = self.run_cmake()
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        for library in [self.built / target.name, *self.built.glob("lib*.so")]:
            shutil.copy2(library, target.parent / library.name)
            if self.editable_mode:  # setuptools copies back only the declared extensions
                shutil.copy2(library, ROOT / "sarathi_kernels" / library.name)
        if self.editable_mode:
            for report in self.built.glob("*.ptxas"):  # for the tests
                shutil.copy2(report, ROOT / "sarathi_kernels" / report.name)

    def run_cmake(self):
        tag = f"{sys.implementation.cache_tag}-{'cuda' if NVCC else 'cpu'}"
        tree = ROOT / "build" / tag
        tree.mkdir(parents=True, exist_ok=True)
        arguments = [
            "cmake", "-S", str(ROOT), "-B", str(tree), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSARATHI_OUTPUT={tree / 'out'}",
            f"-DSARATHI_CUDA={'ON' if NVCC else 'OFF'}",
        ]  # fmt: skip
        if NVCC:
            arguments.append(f"-DCMAKE_CUDA_COMPILER={NVCC}")
            if os.environ.get("SARATHI_CUDA_ARCHS"):
                arguments.append(f"-DSARATHI_CUDA_ARCHS={os.environ['SARATHI_CUDA_ARCHS']}")
        if shutil.which("ninja"):
            arguments.append(f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}")
        subprocess.check_call(arguments + shlex.split(os.environ.get("CMAKE_ARGS", "")))
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.check_call(["cmake", "--build", str(tree), "-j", jobs])
        return tree / "out"


NVCC = find_nvcc()
modules = ["sarathi_kernels._native"]
if NVCC:
    modules.append("sarathi_kernels._cuda")
setup(ext_modules=[Extension(name, sources=[]) for name in modules], cmdclass={"build_ext": CMakeBuild})
