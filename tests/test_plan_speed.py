"""A plan costs next to nothing: it is made on the host in every step, before any kernel runs."""

import time

import pytest
import torch

import sarathi_kernels as sk


# Goals on a quiet machine are 20 and 100 us; the bounds allow for a shared one several times slower.
@pytest.mark.parametrize("batch, bound_us", [(256, 100), (1024, 400)])
def test_plan_with_a_workspace(batch, bound_us):
    spec = sk.AttentionSpec(32, 8, 128, dtype=torch.bfloat16)
    cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32)
    seqused_k = torch.full((batch,), 512, dtype=torch.int32)
    block_table = torch.randperm(batch * 32).to(torch.int32).view(batch, 32)
    workspace = sk.Workspace()
    best = float("inf")
    for _ in range(200):
        start = time.perf_counter()
        plan = sk.plan(spec, cu_seqlens_q, seqused_k, block_table, backend="cpu", workspace=workspace)
        best = min(best, time.perf_counter() - start)
    assert plan.num_items == batch
    assert best * 1e6 < bound_us
