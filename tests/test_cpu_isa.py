"""The choice of instruction set, the objects' symbols, and the thread pool."""

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from sarathi_kernels import testing
from sarathi_kernels.backends import cpu

ROOT = Path(__file__).parent.parent


def python(code: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)


def test_best_isa_is_the_default_and_the_environment_forces_another():
    code = "from sarathi_kernels.backends import cpu; print(cpu.isa(), cpu.isas()[-1])"
    chosen, best = python(code, SARATHI_CPU_ISA="").stdout.split()
    assert chosen == best
    assert python(code, SARATHI_CPU_ISA="generic").stdout.split()[0] == "generic"


def test_unknown_isa_names_those_there_are():
    with pytest.raises(ValueError, match="'sse9'.*generic"):
        cpu.set_isa("sse9")
    failed = python("from sarathi_kernels.backends import cpu; cpu.isa()", SARATHI_CPU_ISA="sse9")
    assert failed.returncode and "SARATHI_CPU_ISA" in failed.stderr and "generic" in failed.stderr


def test_isa_objects_define_no_weak_symbols():
    """A weak copy of an inline function compiled for AVX-512 could be linked into the path of a CPU without it."""
    objects = sorted(ROOT.glob("build/*/CMakeFiles/cpu_*.dir/csrc/cpu/*.o"))
    if not objects or not shutil.which("nm"):
        pytest.skip(f"{len(objects)} kernel objects in build/, nm: {shutil.which('nm')}")
    symbols = subprocess.run(["nm", "-C", *objects], capture_output=True, text=True, check=True).stdout
    assert not re.findall(r"^\S+ [WVu] .*$", symbols, re.MULTILINE)
    tables = set(re.findall(r" [RD] (sarathi::\w+::kernels)$", symbols, re.MULTILINE))
    assert {f"sarathi::{isa}::kernels" for isa in cpu.isas()} <= tables  # nm did read them


def test_concurrent_callers_get_their_own_results():
    inputs = [testing.make_inputs(testing.Case("c", ((9, 300), (1, 77)), testing.make_spec()), torch.float32, seed=s) for s in range(4)]
    want = [x.attention("cpu")[0] for x in inputs]
    wrong = []

    def work(i):
        for _ in range(20):
            if not torch.equal(inputs[i].attention("cpu")[0], want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not any(t.is_alive() for t in threads) and not wrong


def test_pool_survives_a_fork():
    code = """
import os, torch
from sarathi_kernels import testing
torch.set_num_threads(2)
x = testing.make_inputs(testing.Case("c", ((9, 300),), testing.make_spec()), torch.float32)
want = x.attention("cpu")[0]
pid = os.fork()
if pid == 0:
    os._exit(0 if torch.equal(x.attention("cpu")[0], want) else 1)
print(os.waitpid(pid, 0)[1])
"""
    assert python(code).stdout.strip() == "0"
