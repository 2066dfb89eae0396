"""The native CPU kernels against the float64 oracle: every instruction set this machine can run, every dtype, every feature."""

import pytest
import torch

import sarathi_kernels as sk
from sarathi_kernels import testing
from sarathi_kernels.backends import PlanConfig, cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QUANTIZED = [case for case in testing.QUANTIZED_CASES if case.spec.kv_dtype == torch.int8]


@pytest.fixture(params=cpu.isas())
def isa(request):
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


def run(case, dtype, **options):
    inputs = testing.make_inputs(case, dtype)
    out, lse = inputs.attention("cpu", **options)
    testing.check(inputs, out, lse)
    return out, lse


@pytest.mark.parametrize("case", testing.CASES + QUANTIZED, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_oracle(case, dtype, isa):
    run(case, dtype)


@pytest.mark.parametrize("shape", testing.SPLIT_SHAPES.values(), ids=testing.SPLIT_SHAPES)
@pytest.mark.parametrize("features", [{}, *testing.FEATURES.values()], ids=["plain", *testing.FEATURES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_splits_merge_to_the_whole(shape, features, dtype, isa):
    run(testing.Case("split", shape, testing.make_spec(**features)), dtype, config=PlanConfig(8, 96, 64, 100))
