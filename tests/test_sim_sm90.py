"""The sm_90a half of the simulator: bulk copies and wgmma as data, and bugs planted in a warp-specialised kernel.

The expected layouts are computed here from the manual's figures, by other code than the simulator's. Where there is a Hopper
GPU the same kernels, inputs and expected values are held against it.
"""

import ctypes
import itertools
import re

import numpy as np
import pytest
import torch
from sim import build

SCHEDULES = [dict(seed=s, completion=c) for s, c in itertools.product((0, 1, 2), ("late", "eager", "random"))]
NONE, SWIZZLE_128, SWIZZLE_64, SWIZZLE_32 = 0, 1, 2, 3
SPAN = {NONE: 16, SWIZZLE_128: 128, SWIZZLE_64: 64, SWIZZLE_32: 32}


@pytest.fixture(scope="module")
def gpu_library(gpu_library_of):
    return gpu_library_of("gpu_tests_sm90.cu", "sm_90a")


def test_kernels_compile_with_nvcc(gpu_library):
    assert gpu_library.sarathi_gpu_test_sm90


class Tensor(ctypes.Structure):
    """As in gpu_tests_sm90.cu."""

    _fields_ = [(name, ctypes.c_int) for name in ("which", "rank", "swizzle")] + [
        ("dims", ctypes.c_uint64 * 5), ("strides", ctypes.c_uint64 * 5), ("box", ctypes.c_uint32 * 5)
    ]  # fmt: skip


@pytest.fixture(params=["late", "eager", "random", "gpu"])
def run(request):
    """run(kernel, inputs, out, n, tensor, block, smem_bytes): on a GPU, or in the simulator in one completion mode.

    tensor: what the tensor map describes: (input number or -1 for out, element bytes, dims, strides, box, swizzle), or None.
    """
    if request.param != "gpu":
        module = request.getfixturevalue("sim")

        def on_simulator(name, inputs, out, n, tensor, block, smem_bytes):
            module.run_sm90(name, inputs, out, n, tensor, grid=1, block=block, smem_bytes=smem_bytes, seed=3, completion=request.param)

        return on_simulator
    if not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9):
        pytest.skip("there is no Hopper GPU")
    function = request.getfixturevalue("gpu_library").sarathi_gpu_test_sm90

    def on_gpu(name, inputs, out, n, tensor, block, smem_bytes):
        described = Tensor()
        if tensor is not None:
            which, _, dims, strides, box, mode = tensor
            described = Tensor(which, len(dims), mode, tuple(dims), tuple(strides), tuple(box))
        build.call_gpu(function, name, inputs, out, n, ctypes.byref(described), 1, block, ctypes.c_size_t(smem_bytes))

    return on_gpu


def swizzle(data, mode):
    """Rows of SPAN bytes, [rows, SPAN] uint8 from a 1024-byte boundary on: 16-byte chunks exchanged as the manual's figures show."""
    rows, chunks = data.shape[0], data.shape[1] // 16
    out = np.empty_like(data).reshape(rows, chunks, 16)
    for r in range(rows):
        key = {8: r % 8, 4: r // 2 % 4, 2: r // 4 % 2, 1: 0}[chunks]
        for c in range(chunks):
            out[r, c ^ key] = data[r, c * 16 : c * 16 + 16]
    return out.reshape(data.shape)


# ---- bulk copies by tensor map ----

# dims, box, where the box begins (innermost first; some hang over an edge), swizzle
BOXES = [
    ((200, 30), (64, 16), (64, 8), SWIZZLE_128),
    ((200, 30), (64, 16), (160, 20), SWIZZLE_128),
    ((200, 30), (64, 16), (-8, -3), SWIZZLE_128),
    ((96, 20), (32, 24), (64, 0), SWIZZLE_64),
    ((96, 20), (16, 20), (16, 0), SWIZZLE_32),
    ((96, 20), (40, 7), (60, 15), NONE),
    ((128, 3, 40), (64, 1, 32), (64, 2, 16), SWIZZLE_128),
    ((128, 3, 40), (64, 2, 16), (0, 2, 33), SWIZZLE_128),
    ((64, 2, 16, 5), (64, 1, 16, 2), (0, 1, 0, 3), SWIZZLE_128),
    ((64, 2, 16, 5), (64, 1, 8, 4), (0, 1, 12, 3), SWIZZLE_128),
]


def box_of(tensor, box, at):
    """The box, innermost dimension last, zeros where it is outside the tensor."""
    out = np.zeros(box[::-1], tensor.dtype)
    for index in np.ndindex(out.shape):
        place = tuple(i + x for i, x in zip(index, at[::-1]))
        if all(0 <= p < n for p, n in zip(place, tensor.shape)):
            out[index] = tensor[place]
    return out


def strides_of(dims, element=2, pad=16):
    """Byte strides of dimensions 1 .., each with a gap behind it."""
    strides, size = [], dims[0] * element
    for n in dims[1:]:
        size += pad
        strides.append(size)
        size *= n
    return strides


def strided_tensor(dims, seed=0):
    """(bytes of the allocation, the tensor as a view into it with innermost dimension last, byte strides)"""
    strides = strides_of(dims)
    total = sum((n - 1) * s for n, s in zip(dims[1:], strides)) + dims[0] * 2
    buffer = np.random.default_rng(seed).integers(1, 2**16, total // 2, dtype=np.uint16)
    view = np.lib.stride_tricks.as_strided(buffer, dims[::-1], [*strides[::-1], 2])
    return buffer, view, strides


@pytest.mark.parametrize("dims, box, at, mode", BOXES, ids=str)
def test_tma_load(run, dims, box, at, mode):
    buffer, view, strides = strided_tensor(dims)
    want = box_of(view, box, at)
    rows = want.view(np.uint8).reshape(-1, box[0] * 2)
    want = rows if mode == NONE else swizzle(rows, mode)
    out = np.zeros(want.size, np.uint8)
    rest = np.array([*at[2:], 0, 0][:2], np.int32)
    run("tma_load", [rest, buffer], out, [len(dims), want.size, *at[:2]], (1, 2, dims, strides, box, mode), 64, want.size + 8)
    assert (out.reshape(want.shape) == want).all()


@pytest.mark.parametrize("dims, box, at, mode", BOXES, ids=str)
def test_tma_store(run, dims, box, at, mode):
    buffer, view, strides = strided_tensor(dims)
    data = np.random.default_rng(1).integers(1, 2**16, box[::-1], dtype=np.uint16)
    for index in np.ndindex(data.shape):
        place = tuple(i + x for i, x in zip(index, at[::-1]))
        if all(0 <= p < n for p, n in zip(place, view.shape)):
            view[place] = data[index]
    want, out = buffer, strided_tensor(dims)[0]
    rows = data.view(np.uint8).reshape(-1, box[0] * 2)
    staged = rows if mode == NONE else swizzle(rows, mode)
    rest = np.array([*at[2:], 0, 0][:2], np.int32)
    run("tma_store", [rest, staged], out, [len(dims), staged.size, *at[:2]], (-1, 2, dims, strides, box, mode), 64, staged.size)
    assert (out == want).all(), "also the gaps between rows must be as they were"


@pytest.mark.parametrize(
    "map_, message",
    [
        ((1, 2, (64, 8), (120,), (64, 8), SWIZZLE_128), "stride 120 of dimension 1 must be a multiple of 16"),
        ((1, 2, (64, 300), (128,), (64, 257), NONE), "the box is 257 in dimension 1"),
        ((1, 2, (64, 8), (128,), (128, 8), SWIZZLE_128), "the box's rows have 256 bytes, the swizzle 128"),
        ((1, 2, (64, 8), (128,), (4, 8), NONE), "the box's rows have 8 bytes, must be a multiple of 16"),
        ((1, 2, (64, 0), (128,), (64, 8), NONE), "dimension 1 is 0"),
    ],
    ids=str,
)
def test_tensor_maps_that_the_driver_refuses(sim, map_, message):
    with pytest.raises(sim.SimulatorError, match=message):
        sim.run_sm90("tma_load", [np.zeros(2, np.int32), np.zeros(1 << 16, np.uint16)], np.zeros(1024, np.uint8), [2, 1024, 0, 0], map_, grid=1, block=32)


def test_a_map_larger_than_its_buffer_is_out_of_bounds(sim):
    with pytest.raises(sim.SimulatorError, match=r"out_of_bounds: TMA load: bytes \[896, 1024\) of input 1, which has 960"):
        sim.run_sm90(
            "tma_load", [np.zeros(2, np.int32), np.zeros(480, np.uint16)], np.zeros(1024, np.uint8), [2, 1024, 0, 0],
            (1, 2, (64, 8), (128,), (64, 8), SWIZZLE_128), grid=1, block=32, smem_bytes=1032,
        )  # fmt: skip


def test_sm_90_instructions_need_sm_90(sim):
    with pytest.raises(sim.SimulatorError, match="launch: an sm_90 instruction in a launch for sm_80"):
        sim.run_sm90(
            "tma_load", [np.zeros(2, np.int32), np.zeros(512, np.uint16)], np.zeros(1024, np.uint8), [2, 1024, 0, 0],
            (1, 2, (64, 8), (128,), (64, 8), SWIZZLE_128), grid=1, block=32, smem_bytes=1032, arch=80,
        )  # fmt: skip


# ---- wgmma ----


def place_k_major(matrix, mode):
    """[mn, k] 16-bit -> (bytes, leading, stride, step): rows of one span of k each; without swizzle, 8x8 tiles of 128 bytes."""
    mn, k = matrix.shape
    if mode == NONE:  # tiles along k are 128 bytes apart, groups of eight rows follow each other
        tiles = matrix.reshape(mn // 8, 8, k // 8, 8).transpose(0, 2, 1, 3)
        return np.ascontiguousarray(tiles).view(np.uint8).ravel(), 128, 128 * (k // 8), 256
    span = SPAN[mode]
    assert k * 2 == span
    return swizzle(np.ascontiguousarray(matrix).view(np.uint8), mode).ravel(), 16, 8 * span, 32


def place_mn_major(matrix, mode):
    """[mn, k] -> the same of rows of one k each, a span of mn wide; spans of mn follow each other."""
    mn, k = matrix.shape
    if mode == NONE:  # 8x8 tiles with mn innermost: along mn 128 bytes apart, groups of eight k follow each other
        tiles = matrix.T.reshape(k // 8, 8, mn // 8, 8).transpose(0, 2, 1, 3)
        pitch = 128 * (mn // 8)
        return np.ascontiguousarray(tiles).view(np.uint8).ravel(), pitch, 128, 2 * pitch
    width = SPAN[mode] // 2
    blocks = [swizzle(np.ascontiguousarray(matrix[i : i + width].T).view(np.uint8), mode).ravel() for i in range(0, mn, width)]
    return np.concatenate(blocks), k * SPAN[mode], 8 * SPAN[mode], 16 * SPAN[mode]


FORMS = [
    (a, b, mode)
    for mode in (SWIZZLE_128, SWIZZLE_64, SWIZZLE_32, NONE)
    for a, b in (("k", "k"), ("k", "mn"), ("mn", "k"), ("mn", "mn"), ("registers", "k"), ("registers", "mn"))
]
# An MN-major tile is at least a span wide.
WGMMAS = [(n, *form) for n in (8, 64, 128) for form in FORMS if form[1] == "k" or n * 2 >= SPAN[form[2]]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n, a_form, b_form, mode", WGMMAS)
def test_wgmma(run, n, a_form, b_form, mode, dtype):
    k = 64 if mode == NONE else SPAN[mode] // 2
    generator = torch.Generator().manual_seed(n + k)
    a, b = (torch.randn(rows, k, generator=generator).to(dtype) for rows in (64, n))
    bits_a, bits_b = (x.view(torch.int16).numpy().view(np.uint16) for x in (a, b))
    place = {"k": place_k_major, "mn": place_mn_major, "registers": place_k_major}
    bytes_a, *place_a = place[a_form](bits_a, mode)
    bytes_b, *place_b = place[b_form](bits_b, mode)
    start_b = -(-bytes_a.size // 1024) * 1024
    memory = np.zeros(start_b + bytes_b.size, np.uint8)
    memory[: bytes_a.size], memory[start_b:] = bytes_a, bytes_b
    places = [0, *place_a, start_b, *place_b, mode, a_form == "mn", b_form == "mn", a_form == "registers", dtype == torch.bfloat16]
    # Registers of a: the fragments of mma.m16n8k16, warp w has rows 16 w and up.
    thread = np.arange(128)
    row, column = thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2
    registers = np.stack(
        [
            [bits_a[row + r, s + column + c] | bits_a[row + r, s + column + c + 1].astype(np.uint32) << 16 for r, c in ((0, 0), (8, 0), (0, 8), (8, 8))]
            for s in range(0, k, 16)
        ]
    ).transpose(0, 2, 1)
    want = a.double() @ b.double().T
    bound = float((a.double().abs() @ b.double().abs().T).max()) * 2**-20
    out = np.full((128, n // 2), np.nan, np.float32)
    inputs = [memory, np.array(places, np.int32), np.ascontiguousarray(registers)]
    run(f"wgmma_{n}", inputs, out, [memory.size, k // 16], None, 128, memory.size)
    i = np.arange(n // 2)
    got = want.numpy()[row[:, None] + i // 2 % 2 * 8, i // 4 * 8 + column[:, None] + i % 2]
    assert np.abs(out - got).max() <= bound


# ---- planted bugs ----

K = 512


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, K, generator=generator).bfloat16() for rows in (64, 128))
    return a.view(torch.int16).numpy(), b.view(torch.int16).numpy(), (a.double() @ b.double().T).numpy()


def outcome(sim, problem, bug, **settings):
    """"ok", "wrong result", or the kind of error the simulator stopped with; and the message or the totals."""
    a, b, want = problem
    c = np.full((64, 128), np.nan, np.float32)
    try:
        totals = sim.product_sm90(bug, a, b, c, K, **{"livelock_polls": 20_000, **settings})
    except sim.SimulatorError as error:
        return str(error).split(":")[0], str(error)
    return ("ok" if np.abs(c - want).max() < 1e-3 else "wrong result"), totals


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s['seed']}-{s['completion']}")
def test_the_clean_kernel_passes(sim, problem, schedule):
    got, totals = outcome(sim, problem, "None", **schedule)
    assert got == "ok", totals
    assert totals["global_to_shared_bytes"] == (64 + 128) * K * 2 and totals["shared_to_global_bytes"] == 64 * 128 * 4
    assert totals["mma_flops"] == 2 * 64 * 128 * K


# bug -> the kinds it may be reported as, and a pattern of the message.
ALWAYS = {
    "ExpectsTooFewBytes": ("deadlock", r"128 threads wait for mbarrier at shared byte 106496 at planted_sm90.cuh"),
    "ExpectsTooManyBytes": ("deadlock", r"128 threads wait for mbarrier at shared byte 106496 at planted_sm90.cuh"),
    "NoWaitForFree": ("race|bad_operand", "starts a copy onto bytes|one arrival too many"),
    "WrongParity": ("race|deadlock", "."),
    "ReleasesBeforeWait": ("race", "starts a copy onto bytes that"),
    "FreeCountsOneWarp": ("race|deadlock", "."),
    "NoWgmmaFence": ("race", "wgmma without a wgmma.fence"),
    "NoProxyFence": ("race", "reads asynchronously bytes that thread .* wrote at .*, without a fence.proxy.async"),
    "NoInitFence": ("race", "starts a bulk copy on an mbarrier that thread 0 .* wrote"),
    "NoBarrierAfterInit": ("race|bad_operand", "nothing orders the two|there is no mbarrier"),
    "TileMisaligned": ("misaligned", "TMA load's destination: shared offset 64 is not a multiple of 128"),
    "WrongStride": ("race", "asynchronous read of bytes"),
    "NoSwizzle": ("wrong result", None),
    "WrongCoordinate": ("wrong result", None),
    "OneWarpFewer": ("divergence", "warp 7 took part in 31 of the 32 wgmma of its warpgroup"),
    "StoreNotWaitedFor": ("race", "thread 128 ended without waiting for its bulk stores"),
    "TooManyRegisters": ("livelock", "threads wait for registers that setmaxnreg.inc waits for 224"),
    "BarrierOverwritten": ("race", "writes bytes that"),
}


@pytest.mark.parametrize("bug", ALWAYS)
def test_caught_in_every_schedule(sim, problem, bug):
    kind, message = ALWAYS[bug]
    for schedule in SCHEDULES:
        got, detail = outcome(sim, problem, bug, **schedule)
        assert re.fullmatch(kind, got), (schedule, got, detail)
        assert message is None or re.search(message, detail), detail


def test_accumulators_read_too_early_are_stale_when_wgmma_is_late(sim, problem):
    outcomes = {(s["seed"], s["completion"]): outcome(sim, problem, "WaitsForTooLittle", **s)[0] for s in SCHEDULES}
    assert all(got == "wrong result" for (_, completion), got in outcomes.items() if completion == "late"), outcomes


def test_an_overwritten_mbarrier_is_noticed_without_the_race_check(sim, problem):
    got, detail = outcome(sim, problem, "BarrierOverwritten", check_races=False)
    assert got == "bad_operand" and "any more: it was overwritten" in detail, detail


def test_all_planted_bugs_are_covered():
    text = (build.ROOT / "tests" / "sim" / "planted_sm90.cuh").read_text().split("#define SARATHI_PLANTED_SM90")[1]
    names = set(re.findall(r"X\((\w+)\)", text)) - {"X"}
    assert names == {"None", "WaitsForTooLittle", *ALWAYS}
