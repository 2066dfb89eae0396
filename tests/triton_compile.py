"""Compiling the Triton kernels for a GPU that is not there: the backend's own launches, recorded instead of made."""

import contextlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sarathi_kernels.backends import triton_attention as backend

TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


class Launch(NamedTuple):
    kernel: object
    args: tuple
    options: dict


class Resources(NamedTuple):
    """Of one compiled kernel: registers per thread, spilled bytes per thread, shared memory per program, warps, PTX."""

    registers: int
    spilled: int
    shared: int
    num_warps: int
    ptx: str


@contextlib.contextmanager
def recording(arch):
    """Within, the backend believes in a GPU of `arch`; yields the list that its launches go to."""
    launches = []

    def launcher(kernel, grid):
        return lambda *args, **options: launches.append(Launch(kernel, args, options))

    with mock.patch.object(triton.JITFunction, "__getitem__", launcher), mock.patch.object(backend, "_arch", lambda device: arch):
        yield launches


def compile_launch(launch, arch):
    """Compiles a launch as Triton itself would specialise it: divisibility by 16, ones and None as constants."""
    kernel, args, options = launch
    signature, constants, attributes = {}, {}, {}
    values = dict(zip(kernel.arg_names, args), **{k: v for k, v in options.items() if k in kernel.arg_names})
    for i, name in enumerate(kernel.arg_names):
        value, parameter = values[name], kernel.params[i]
        special = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
            aligned = special and value % 16 == 0
        if name not in constants and aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    settings = {name: value for name, value in options.items() if name not in values}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=settings)
    return Resources(*_usage(compiled.asm["cubin"]), compiled.metadata.shared, compiled.metadata.num_warps, compiled.asm["ptx"])


def _usage(cubin):
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text).groups()
    return int(registers), int(stack) + int(local)
