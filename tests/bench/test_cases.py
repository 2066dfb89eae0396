"""Cases as data: names, selection, and rows sampled from a batch."""

import pytest
import torch

from bench import cases
from sarathi_kernels import testing


def test_selection_by_name_pattern_and_group():
    assert [c.name for c in cases.select("A/llama8b, B/smollm2")] == ["A/llama8b", "B/smollm2"]
    assert {c.name for c in cases.select("A/*")} == {f"A/{model}" for model in cases.MODELS}
    named = {c.name for c in cases.select("named/smollm2")}
    assert named == {f"{b}/smollm2" for b in "ABCD"}
    hybrid = cases.select("hybrid/llama8b")
    assert len(hybrid) == len(cases.HYBRID) and all(cases.is_mixed(c.requests) for c in hybrid)
    assert cases.select("hybrid/llama8b,hybrid/llama8b") == hybrid
    with pytest.raises(ValueError, match="'E/llama8b'"):
        cases.select("A/llama8b,E/llama8b")


def test_grid_covers_what_was_asked():
    names = cases.PERFORMANCE_CASES
    for name in ("c256@0+32@1024/llama8b", "c2048@16384+250@16384/yi6b", "1@131072/llama70b_tp8", "c512@4096+1@131072/smollm2"):
        assert name in names
    assert names["c512@4096+32@4096/llama8b"].requests == ((512, 4608), *((1, 4096),) * 32)
    assert names["D/llama8b"].requests == ((256, 16640), *((1, 8192),) * 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_device_inputs_are_a_valid_batch(dtype):
    case = testing.Case("hybrid", ((20, 45), (1, 33), (1, 16)), cases.MODELS["smollm2"])
    inputs = cases.device_inputs(case, dtype, "cpu", seed=3)
    testing.check(inputs, *inputs.attention("reference"))
    pages = [inputs.block_table[i, : -(-n // 16)].tolist() for i, n in enumerate((45, 33, 16))]
    flat = sum(pages, [])
    assert len(set(flat)) == len(flat) == 3 + 3 + 1 and flat != sorted(flat), "pages must be distinct and in random order"
    other = cases.device_inputs(case, dtype, "cpu", seed=4)
    assert not torch.equal(inputs.k_cache, other.k_cache)


def test_sampled_rows_have_the_results_of_the_whole_batch():
    case = testing.Case("hybrid", ((20, 45), (0, 7), (1, 33), (3, 16)), cases.MODELS["smollm2"])
    inputs = cases.device_inputs(case, torch.float32, "cpu")
    want, want_lse = inputs.oracle()
    rows, sampled = cases.sample_rows(inputs, 12)
    got, got_lse = sampled.oracle()
    assert {0, 19, 21, 23} <= set(rows.tolist()) and len(rows) == 12
    torch.testing.assert_close(got, want[rows], rtol=0, atol=1e-12)
    torch.testing.assert_close(got_lse, want_lse[rows], rtol=0, atol=1e-12)
    all_rows, everything = cases.sample_rows(inputs, 1000)
    assert all_rows.tolist() == list(range(24)) and everything.q.shape == inputs.q.shape


def test_a_part_of_a_batch_has_the_same_rows():
    case = testing.Case("hybrid", ((20, 45), (1, 33), (1, 16)), cases.MODELS["smollm2"])
    inputs = cases.device_inputs(case, torch.float32, "cpu")
    out, _ = inputs.oracle()
    part, _ = cases.part(inputs, [1, 2]).oracle()
    assert torch.equal(part, out[20:])


def test_page_size_is_part_of_the_name():
    case = cases.PERFORMANCE_CASES["B/llama8b"]
    assert cases.with_page_size(case, 16) is case
    other = cases.with_page_size(case, 128)
    assert other.name == "B/llama8b-p128" and other.spec.page_size == 128 and other.requests == case.requests
