"""The interpreter of plans against the dense oracle: if these agree, a plan says what it should."""

import pytest
import torch

import sarathi_kernels as sk
from sarathi_kernels import testing
from sarathi_kernels.backends import PlanConfig

CASES = testing.CASES + testing.QUANTIZED_CASES


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_run_plan_matches_dense(case, dtype):
    inputs = testing.make_inputs(case, dtype)
    out, lse = inputs.attention("reference")
    testing.check(inputs, out, lse)


@pytest.mark.parametrize("split", [64, 100])
@pytest.mark.parametrize("shape", testing.SPLIT_SHAPES.values(), ids=testing.SPLIT_SHAPES)
@pytest.mark.parametrize("features", [{}, *testing.FEATURES.values()], ids=["plain", *testing.FEATURES])
def test_splits_merge_to_the_whole(shape, features, split):
    case = testing.Case("split", shape, testing.make_spec(**features))
    inputs = testing.make_inputs(case, torch.float32)
    plan = inputs.plan("reference", config=PlanConfig(16, 32, split, split))
    assert plan.num_merges > 0 or "window_left" in features
    out, lse = sk.attention(inputs.q, inputs.k_cache, inputs.v_cache, plan, return_lse=True, **inputs.kwargs)
    testing.check(inputs, out, lse)
