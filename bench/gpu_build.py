"""The build step of `make gpu`: CMake as setup.py calls it, in the tree, with whatever Python, pybind11 and CMake are there.

Not through pip: that would want a network for the build requirements, or their exact versions.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parent.parent


def cmake_arguments(build: Path, *, nvcc: str | None, archs: str | None) -> list[str]:
    arguments = [
        "cmake", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DSARATHI_OUTPUT={build / 'out'}", f"-DSARATHI_CUDA={'ON' if nvcc else 'OFF'}",
    ]  # fmt: skip
    if shutil.which("ninja"):
        arguments += ["-G", "Ninja"]
    if nvcc:
        arguments.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        if archs:
            arguments.append(f"-DSARATHI_CUDA_ARCHS={archs}")
    return arguments


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_build", description=__doc__.split("\n")[0])
    parser.add_argument("--build", required=True, help="CMake's folder")
    parser.add_argument("--nvcc", help="the CUDA compiler; without it only the host module is built")
    parser.add_argument("--archs", help='for example "90a"')
    parser.add_argument("--install", default=str(ROOT / "sarathi_kernels"), help="where the modules go")
    args = parser.parse_args(arguments)
    build = Path(args.build)
    subprocess.run(cmake_arguments(build, nvcc=args.nvcc, archs=args.archs), check=True)
    subprocess.run(["cmake", "--build", str(build), "-j", str(os.cpu_count() or 1)], check=True)
    libraries = sorted((build / "out").glob("*.so"))
    for made in [*libraries, *(build / "out").glob("*.ptxas")]:
        shutil.copy2(made, args.install)
    print("built", ", ".join(library.name for library in libraries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
