"""The same attention, its own source in the simulator and its machine code on a GPU: numbers that agree to rounding."""

import cuda_sim
import pytest
import torch

from sarathi_kernels import backends
from sarathi_kernels.backends import Problem, cuda
from sarathi_kernels.testing import SHAPES, SPLIT_SHAPES, Case, check, make_inputs, make_spec

PROBLEM = Problem(make_spec(dtype=torch.bfloat16), torch.device("cuda"))
REASON = "no CUDA device" if not torch.cuda.is_available() else backends.get("cuda").supports(PROBLEM)
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"the CUDA backend cannot run here: {REASON}")

CASES = [(name, SHAPES[name], None) for name in ("hybrid", "tile_edges", "nothing", "longer_than_kv")]
CASES += [(name, shape, 64) for name, shape in SPLIT_SHAPES.items()]


@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", cuda.HEAD_DIMS)
@pytest.mark.parametrize("name, shape, split", CASES, ids=[name for name, *_ in CASES])
def test_attention_on_the_gpu_is_attention_in_the_simulator(name, shape, split, head_dim, dtype):
    case = Case(name, shape, make_spec((4, 2), head_dim))
    on_host, on_gpu = make_inputs(case, dtype), make_inputs(case, dtype, device="cuda")
    config = cuda.plan_config(on_host.spec)
    if split:
        config = config._replace(decode_split=split, prefill_split=split)
    want, want_lse, _ = cuda_sim.attention(on_host, config=config)
    out, lse = (t.cpu() for t in on_gpu.attention("cuda", config=config))
    check(on_host, out, lse)
    # Weights are rounded to 16 bits from sums that may differ in their last bit: one step of the output's largest value.
    assert torch.equal(torch.isneginf(lse), torch.isneginf(want_lse))
    assert ((lse - want_lse).abs()[~torch.isneginf(lse)] <= 1e-4).all()
    assert (out.double() - want.double()).abs().max() <= 2 * torch.finfo(dtype).eps * want.double().abs().max()
