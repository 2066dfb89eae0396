"""What each instruction does, as data: the same kernels, inputs and expected values in the simulator and on a GPU.

The expected values are computed here, from the PTX manual's fragment layouts, by other code than the simulator's.
"""

import ctypes

import numpy as np
import pytest
import torch
from sim import build

LANES = np.arange(32)


@pytest.fixture(scope="module")
def gpu_library(gpu_library_of):
    return gpu_library_of("gpu_tests.cu", "sm_80")


def test_kernels_compile_with_nvcc(gpu_library):
    assert gpu_library.sarathi_gpu_test


@pytest.fixture(params=["simulator", "gpu"])
def run(request):
    """run(kernel, inputs, out, n, grid, block, smem_bytes) -> out, on the simulator or a GPU."""
    if request.param == "simulator":
        module = request.getfixturevalue("sim")

        def on_simulator(name, inputs, out, n=(), **launch):
            module.run(name, inputs, out, list(n), **{"grid": 1, "block": 32, **launch})
            return out

        return on_simulator
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    function = request.getfixturevalue("gpu_library").sarathi_gpu_test

    def on_gpu(name, inputs, out, n=(), grid=1, block=32, smem_bytes=0):
        build.call_gpu(function, name, inputs, out, n, grid, block, ctypes.c_size_t(smem_bytes))
        return out

    return on_gpu


def bits(tensor):
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


def random_16(shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- ldmatrix ----


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "trans"])
@pytest.mark.parametrize("matrices", [2, 4])
@pytest.mark.parametrize("places", ["in_order", "shuffled", "one_row"])
def test_ldmatrix(run, matrices, transposed, places):
    rng = np.random.default_rng(matrices)
    memory = rng.integers(0, 2**16, 64 * 8, dtype=np.uint16)  # 64 rows of 8 elements
    row = {"in_order": LANES, "shuffled": rng.permutation(64)[:32], "one_row": np.full(32, 7)}[places]
    out = run(
        "ldmatrix", [memory, (row * 16).astype(np.int32)], np.zeros((32, matrices), np.uint32),
        (memory.nbytes, matrices, transposed), smem_bytes=memory.nbytes,
    )  # fmt: skip
    for m in range(matrices):
        matrix = memory.reshape(64, 8)[row[8 * m : 8 * m + 8]]
        matrix = matrix.T if transposed else matrix
        # Lane l holds elements 2 (l % 4) and the next of row l / 4, the first in the low half.
        want = matrix[LANES // 4, LANES % 4 * 2] | matrix[LANES // 4, LANES % 4 * 2 + 1].astype(np.uint32) << 16
        assert (out[:, m] == want).all()


# ---- mma ----


def fragments_a(a):
    """[16, 16] of 16 bits -> [32, 4] words: a0 a1 a2 a3 as in the manual's figure for m16n8k16."""
    row, column = LANES // 4, LANES % 4 * 2
    pairs = [(0, 0), (8, 0), (0, 8), (8, 8)]
    return np.stack([a[row + r, column + c] | a[row + r, column + c + 1].astype(np.uint32) << 16 for r, c in pairs], 1)


def fragments_b(b):
    """[16, 8] -> [32, 2] words: rows (k) in pairs, column l / 4."""
    row, column = LANES % 4 * 2, LANES // 4
    return np.stack([b[row + r, column] | b[row + r + 1, column].astype(np.uint32) << 16 for r in (0, 8)], 1)


def fragments_c(c):
    """[16, 8] float32 -> [32, 4]."""
    row, column = LANES // 4, LANES % 4 * 2
    return np.stack([c[row, column], c[row, column + 1], c[row + 8, column], c[row + 8, column + 1]], 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mma_of_one_hot_matrices_is_exact(run, dtype):
    """Each product term on its own: a layout error cannot hide behind rounding."""
    values_a = torch.arange(256).reshape(16, 16).remainder(97).to(dtype)
    for k in range(16):
        b = torch.zeros(16, 8, dtype=dtype)
        b[k] = torch.arange(1, 9).to(dtype)
        c = torch.arange(128, dtype=torch.float32).reshape(16, 8)
        out = run_mma(run, values_a, b, c)
        want = values_a.double() @ b.double() + c.double()
        assert (out == fragments_c(want.numpy())).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 100.0])
def test_mma_of_random_matrices(run, dtype, scale):
    a, b = random_16((16, 16), dtype, 1) * scale, random_16((16, 8), dtype, 2)
    c = torch.randn(16, 8, generator=torch.Generator().manual_seed(3))
    want = a.double() @ b.double() + c.double()
    bound = (a.double().abs() @ b.double().abs() + c.double().abs()) * 2**-21  # float32 sums, hardware truncates
    error = np.abs(run_mma(run, a, b, c) - fragments_c(want.numpy()))
    assert (error <= fragments_c(bound.numpy())).all()


def test_mma_of_special_values(run):
    """Infinities and NaN spread along their row and no further; half subnormals count; bfloat16 goes beyond half's range."""
    a, b = torch.zeros(16, 16, dtype=torch.float16), torch.ones(16, 8, dtype=torch.float16)
    a[0, 3], a[1, 0], a[2, 15] = torch.inf, torch.nan, 2.0**-24
    out = run_mma(run, a, b, torch.zeros(16, 8))
    want = fragments_c((a.double() @ b.double()).numpy())
    assert np.array_equal(out, want, equal_nan=True)
    big = torch.full((16, 16), 1e30, dtype=torch.bfloat16)
    out = run_mma(run, big, torch.full((16, 8), 1e-30, dtype=torch.bfloat16), torch.zeros(16, 8))
    assert np.allclose(out, 16, rtol=2e-2)


def run_mma(run, a, b, c):
    inputs = [fragments_a(bits(a)), fragments_b(bits(b)), fragments_c(c.numpy())]
    return run("mma", inputs, np.zeros((32, 4), np.float32), (a.dtype == torch.bfloat16,))


# ---- cp.async, shuffles, votes ----


@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async_fills_with_zeros(run, size):
    threads = 64
    data = np.random.default_rng(size).integers(1, 256, (threads, size), dtype=np.uint8)
    src_bytes = (np.arange(threads) % (size + 1)).astype(np.int32)
    out = run("cp_async", [data, src_bytes], np.zeros((threads, size), np.uint8), (size,), block=threads, smem_bytes=threads * size)
    assert (out == np.where(np.arange(size) < src_bytes[:, None], data, 0)).all()


@pytest.mark.parametrize("completion", ["late", "eager", "random"])
def test_cp_async_completes_whenever(sim, completion):
    data = np.arange(64 * 16, dtype=np.uint8).reshape(64, 16)
    out = np.zeros_like(data)
    sim.run("cp_async", [data, np.full(64, 16, np.int32)], out, [16], grid=1, block=64, smem_bytes=1024, completion=completion, seed=5)
    assert (out == data).all()


@pytest.mark.parametrize("width", [32, 16, 8, 4])
@pytest.mark.parametrize("kind", ["idx", "xor", "up", "down"])
def test_shuffle(run, kind, width):
    value = np.random.default_rng(0).integers(0, 1000, 32).astype(np.int32)
    base, within = LANES // width * width, LANES % width
    for by in (0, 1, 2, 3, 7, 16, 31):
        got = run("shuffle", [value, np.full(32, by, np.int32)], np.zeros(32, np.int32), (["idx", "xor", "up", "down"].index(kind), width))
        if kind == "idx":
            source = base + by % width
        elif kind == "xor":
            source = np.where((LANES ^ by) // width > LANES // width, LANES, LANES ^ by)
        elif kind == "up":
            source = np.where(within - by < 0, LANES, LANES - by)
        else:
            source = np.where(within + by >= width, LANES, LANES + by)
        assert (got == value[source]).all(), by


def test_shuffle_from_different_lanes(run):
    value, source = LANES.astype(np.int32) * 10, np.random.default_rng(1).integers(0, 32, 32).astype(np.int32)
    assert (run("shuffle", [value, source], np.zeros(32, np.int32), (0, 32)) == value[source]).all()


@pytest.mark.parametrize("pattern", [0, 0xFFFFFFFF, 0x80000001, 0x12345678])
def test_vote(run, pattern):
    predicate = (pattern >> LANES & 1).astype(np.int32)
    out = run("vote", [predicate], np.zeros(128, np.uint32))
    assert (out[:96].reshape(32, 3) == [pattern, pattern != 0, pattern == 0xFFFFFFFF]).all()
    assert (out[96:] == np.where(LANES % 2, pattern & 0xAAAAAAAA, 0)).all()


# ---- arithmetic ----


def test_narrow_rounds_like_torch(run):
    rng = np.random.default_rng(0)
    np.seterr(all="ignore")
    x = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)  # every exponent
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float().numpy()
    ties = (np.arange(2**16, dtype=np.uint32) << 16 | 0x8000).view(np.float32)  # half way between neighbours of bfloat16
    x = np.concatenate([x, x * 1e-38, rng.standard_normal(50_000).astype(np.float32) * 1e-6, halves, halves * np.float32(1.00048828125), ties])
    x = x[~np.isnan(x)]  # a NaN stays one, with other bits
    out = run("narrow", [x], np.zeros((2, x.size), np.uint16), (x.size,), block=128)
    assert (out[0] == bits(torch.from_numpy(x).bfloat16())).all()
    assert (out[1] == bits(torch.from_numpy(x).half())).all()
    nan = run("narrow", [np.array([np.nan, -np.nan], np.float32)], np.zeros((2, 2), np.uint16), (2,))
    assert torch.from_numpy(nan.view(np.int16)[0]).view(torch.bfloat16).isnan().all()
    assert torch.from_numpy(nan.view(np.int16)[1]).view(torch.float16).isnan().all()


def test_widen_is_exact_for_every_pattern(run):
    pattern = np.arange(2**16, dtype=np.uint16)
    out = run("widen", [pattern], np.zeros((2, 2**16), np.float32), (2**16,), block=128)
    for got, dtype in zip(out, (torch.bfloat16, torch.float16)):
        assert np.array_equal(got, torch.from_numpy(pattern.view(np.int16)).view(dtype).float().numpy(), equal_nan=True)


def test_approximations(run):
    x = np.concatenate([np.linspace(-140, 100, 1001), np.linspace(1e-3, 9, 1000)]).astype(np.float32)
    with np.errstate(all="ignore"):
        out = run("approximate", [x], np.zeros((4, x.size), np.float32), (x.size,))
        wide = x.astype(np.float64)
        exp2 = np.where(wide < -126, 0, np.exp2(wide))
        assert np.allclose(out[0], exp2, rtol=2**-21, atol=0)
        positive = x > 0
        assert np.allclose(out[1][positive], np.log2(wide[positive]), rtol=2**-20, atol=2**-20)
        assert np.allclose(out[2], np.tanh(wide), rtol=2**-10, atol=1e-6)
        assert np.allclose(out[3], 1 / wide, rtol=2**-21)
    special = np.array([-np.inf, np.inf, 0], np.float32)
    assert (run("approximate", [special], np.zeros((4, 3), np.float32), (3,))[0] == [0, np.inf, 1]).all()


# ---- threads together ----


def test_named_barriers_hand_values_over(run):
    values = np.array([5, 70, 900, 11], np.int32)
    out = run("named_barriers", [values], np.zeros((4, 32), np.int32), (4,), block=64, smem_bytes=128)
    assert (out == values[:, None] + (LANES + 1) % 32).all()


def test_last_arriver_sees_what_all_wrote(run):
    values = np.random.default_rng(0).integers(-1000, 1000, 16 * 64).astype(np.int32)
    out = run("last_arriver", [values], np.concatenate([np.zeros(2), np.full(values.size, -1)]).astype(np.int32), grid=16, block=64, smem_bytes=16)
    assert out[0] == values.sum() and out[1] == 0


def test_blocks_alive_at_once_can_wait_for_each_other(run):
    out = run("relay", [], np.zeros(9, np.int32), grid=8, block=32)
    assert out[0] == 8 and (out[1:] == np.arange(7, -1, -1)).all()


def test_atomics(run):
    total = 8 * 64
    out = run("atomics", [], np.zeros(3, np.int32), grid=8, block=64)
    assert out.tolist() == [total * (total - 1) // 2, total - 1, total]
