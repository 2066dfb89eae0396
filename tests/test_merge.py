"""merge_states against one softmax over all keys."""

import pytest
import torch

import sarathi_kernels as sk

BACKENDS = ["cpu", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str)
@pytest.mark.parametrize("num_states", [1, 2, 3, 17, 133])
def test_matches_one_softmax(num_states, dtype, tolerance, backend):
    generator = torch.Generator().manual_seed(num_states)
    outs = torch.randn(num_states, 6, 3, 64, generator=generator).to(dtype)
    lses = torch.randn(num_states, 6, 3, generator=generator) * 5
    out, lse = sk.merge_states(outs, lses, backend=backend)
    weights = torch.softmax(lses.double(), dim=0)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert (out.double() - (weights.unsqueeze(-1) * outs.double()).sum(0)).abs().max() <= tolerance
    assert (lse.double() - torch.logsumexp(lses.double(), 0)).abs().max() <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_that_saw_nothing_weigh_nothing(backend):
    outs, lses = torch.randn(3, 2, 1, 64), torch.randn(3, 2, 1)
    lses[1] = -torch.inf
    outs[1] = torch.nan
    lses[:, 1] = -torch.inf
    outs[:, 1] = torch.nan
    out, lse = sk.merge_states(outs, lses, backend=backend)
    want, want_lse = sk.merge_states(outs[[0, 2]], lses[[0, 2]], backend=backend)
    assert torch.equal(out[0], want[0]) and torch.equal(lse[0], want_lse[0])
    assert (out[1] == 0).all() and torch.isneginf(lse[1]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_lses_do_not_overflow(backend):
    outs = torch.stack((torch.full((1, 1, 64), 1.0), torch.full((1, 1, 64), 3.0)))
    out, lse = sk.merge_states(outs, torch.tensor([[[1e4]], [[1e4]]]), backend=backend)
    assert torch.allclose(out, torch.full((1, 1, 64), 2.0)) and abs(lse.item() - 1e4 - 0.6931) < 1e-2


@pytest.mark.parametrize(
    "outs, lses, message",
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 3), r"outs must be .*got torch.float32 \(2, 3, 4\)"),
        (torch.zeros(0, 3, 4, 8), torch.zeros(0, 3, 4), "at least one state"),
        (torch.zeros(2, 3, 4, 8, dtype=torch.int32), torch.zeros(2, 3, 4), "got torch.int32"),
        (torch.zeros(2, 3, 4, 8), torch.zeros(2, 3), r"lses must be float32 of shape \(2, 3, 4\).*got torch.float32 \(2, 3\)"),
        (torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4).half(), "lses must be float32 .*got torch.float16"),
    ],
)
def test_bad_input_is_refused_by_value(outs, lses, message):
    with pytest.raises(ValueError, match=message):
        sk.merge_states(outs, lses)


def test_opcheck():
    args = (torch.randn(3, 2, 2, 64), torch.randn(3, 2, 2), torch.zeros(2, 2, 64), torch.zeros(2, 2), "cpu")
    torch.library.opcheck(torch.ops.sarathi.merge_states, args)
