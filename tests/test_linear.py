"""Packed linear layers against float64, in every epilogue, with odd row counts and strided rows."""

import pytest
import sarathi_kernels as sk
import torch
from torch.nn import functional

pytestmark = pytest.mark.skipif(sk.linear_reason(32, 16) is not None, reason=str(sk.linear_reason(32, 16)))
# Largest relative error of the result's norm: rounding of inputs to bfloat16 (2^-9) or to 127 steps of the row's largest value.
ERROR = {"bfloat16": 0.005, "int8": 0.025}


def inputs(rows, n, k):
    torch.manual_seed(rows * n + k)
    x = torch.randn(rows, 2 * k).bfloat16()[:, :k]
    return x, torch.randn(n, k).bfloat16(), torch.rand(k) + 0.5


def error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("rows", [1, 7, 12, 13, 65, 265, 600])
@pytest.mark.parametrize(("n", "k"), [(32, 16), (96, 80), (576, 1536)])
def test_every_epilogue_against_float64(kind, rows, n, k):
    x, weight, norm = inputs(rows, n, k)
    plain = x.double() @ weight.double().T
    normed = functional.rms_norm(x.double(), (k,), norm.double(), 1e-5) @ weight.double().T
    residual = torch.randn(rows, n).bfloat16()
    assert error(sk.PackedLinear(weight, kind)(x), plain) < ERROR[kind]
    assert error(sk.PackedLinear(weight, kind, norm=norm, eps=1e-5)(x, out=torch.full((rows, n), torch.nan)), normed) < ERROR[kind]
    total = residual.clone()
    assert sk.PackedLinear(weight, kind)(x, add_to=total) is total
    assert error(total, residual.double() + plain) < ERROR[kind]
    gate, up = normed.chunk(2, dim=1)
    got = sk.PackedLinear(weight, kind, norm=norm, eps=1e-5, swiglu=True)(x)
    assert error(got, functional.silu(gate) * up) < 2 * ERROR[kind]


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_rows_bits_do_not_depend_on_its_neighbours(kind):
    x, weight, norm = inputs(300, 64, 48)
    layer = sk.PackedLinear(weight, kind, norm=norm, eps=1e-5)
    together = layer(x)
    for begin, end in ((0, 1), (5, 12), (100, 290)):
        assert torch.equal(layer(x[begin:end]), together[begin:end])


def test_no_rows_and_rows_of_zeros():
    _, weight, norm = inputs(1, 64, 48)
    for kind in ("bfloat16", "int8"):
        layer = sk.PackedLinear(weight, kind, norm=norm, eps=1e-5)
        assert layer(torch.empty(0, 48, dtype=torch.bfloat16)).shape == (0, 64)
        assert torch.equal(layer(torch.zeros(3, 48, dtype=torch.bfloat16)), torch.zeros(3, 64, dtype=torch.bfloat16))


def test_bad_input_is_refused_with_the_values():
    x, weight, norm = inputs(3, 64, 48)
    layer, square, y = sk.PackedLinear(weight, "bfloat16"), sk.PackedLinear(weight[:32, :32], "bfloat16"), torch.zeros(3, 32).bfloat16()
    for make, message in [
        (lambda: sk.PackedLinear(weight, "int4"), "kind must be one of bfloat16, int8, got 'int4'"),
        (lambda: sk.PackedLinear(weight[:40], "int8"), "multiple of 32 .* got 40 and 48"),
        (lambda: sk.PackedLinear(weight, "int8", norm=norm[:5]), r"norm must have shape \(48,\), got \(5,\)"),
        (lambda: layer(x[:, :32]), r"x must be bfloat16 of shape \(tokens, 48\)"),
        (lambda: layer(x.float()), "got torch.float32"),
        (lambda: layer(x, add_to=torch.zeros(3, 64)), "add_to must be torch.bfloat16"),
        (lambda: layer(x, add_to=torch.zeros(3, 64).bfloat16(), out=torch.zeros(3, 64)), "one epilogue"),
        (lambda: layer(x, out=torch.zeros(3, 64).half()), "out must be torch.bfloat16 or torch.float32"),
        (lambda: square(y, add_to=y), "not x itself"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
