"""The named cases for pytest-benchmark: `pytest bench --benchmark-only`, and `--benchmark-compare` against an earlier run.

Sizes that finish in minutes: SmolLM2's heads. Each is checked before it is timed.
"""

import pytest
import torch

from bench import attention, cases
from sarathi_kernels import backends
from sarathi_kernels.backends import Problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("backend", [name for name in backends.NAMES if name != "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", [f"{batch}/smollm2" for batch in cases.NAMED])
def test_attention(benchmark, name, dtype, backend):
    case = cases.PERFORMANCE_CASES[name]
    reason = backends.get(backend).supports(Problem(case.with_dtype(dtype), DEVICE))
    if reason is not None:
        pytest.skip(reason)
    inputs = cases.device_inputs(case, dtype, DEVICE)
    call = attention.our_call(inputs, backend)
    benchmark.extra_info["max_err"] = attention.Oracle(inputs).check(call())

    def finished():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    benchmark.pedantic(finished, rounds=7, warmup_rounds=2)
