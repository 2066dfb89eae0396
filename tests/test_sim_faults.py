"""Bugs planted in a small pipelined kernel (tests/sim/planted.cuh): each is caught, and the clean kernel passes.

Also what a launch refuses, how a stand-still is reported, and the totals a test can hold a kernel to.
"""

import itertools
import re

import numpy as np
import pytest
import torch
from sim import build

SEEDS, COMPLETIONS = (0, 1, 2, 3), ("late", "eager", "random")
SCHEDULES = [dict(seed=s, completion=c) for s, c in itertools.product(SEEDS, COMPLETIONS)]
K, ROWS, GRID = 512, 60, 4


@pytest.fixture(scope="module")
def problem():
    """(bits of a, bits of b, the product in float64, with rows of a beyond ROWS as zeros)"""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, K, generator=generator).bfloat16() for _ in range(2))
    want = a.double() @ b.double().T
    want[ROWS:] = 0
    return a.view(torch.int16).numpy(), b.view(torch.int16).numpy(), want.numpy()


def outcome(sim, problem, bug, **settings):
    """"ok", "wrong result", or the kind of error the simulator stopped with; and the message or the totals."""
    a, b, want = problem
    c = np.full((64, 64), np.nan, np.float32)
    try:
        totals = sim.product(bug, a, b, c, K, ROWS, **{"grid": GRID, "livelock_polls": 20_000, **settings})
    except sim.SimulatorError as error:
        return str(error).split(":")[0], str(error)
    return ("ok" if np.abs(c - want).max() < 1e-3 and totals["counter"] == 0 else "wrong result"), totals


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s['seed']}-{s['completion']}")
def test_the_clean_kernel_passes(sim, problem, schedule):
    assert outcome(sim, problem, "None", **schedule)[0] == "ok"


# Caught in every schedule, by one kind of report. Plain loads and stores are caught by the pages around a buffer.
ALWAYS = {
    "WaitForTooLittle": ("race", "reads bytes to which a copy is still under way"),
    "NoBarrierAfterWait": ("race", "reads bytes that thread .* wrote at planted.cuh:.* and nothing orders the two"),
    "NoBarrierBeforeRefill": ("race", "starts a copy onto bytes that thread .* read at planted.cuh:.*"),
    "BarrierCountsTooMany": ("race", "nothing orders the two"),
    "LdmatrixNextRow": ("wrong result", None),
    "NoSwizzle": ("wrong result", None),
    "NoZeroFill": ("wrong result", None),
    "LdmatrixMisaligned": ("misaligned", r"ldmatrix row: shared offset \d+ is not a multiple of 16"),
    "CopyMisaligned": ("misaligned", "cp.async source is not a multiple of 16"),
    "SourceOutOfBounds": ("out_of_bounds", r"cp.async source: bytes \[\d+, \d+\) of a, which has 65536"),
    "SharedOutOfBounds": ("out_of_bounds", "cp.async destination: bytes .* of 16384 bytes of shared memory"),
    "PlainStoreOutOfShared": ("out_of_bounds", "a plain access at byte 16392 of the 16384 bytes of shared memory of its CTA"),
    "PlainLoadOutOfGlobal": ("out_of_bounds", "a plain access at byte 65568 of b, which has 65536"),
    "WriteReadOnly": ("out_of_bounds", "st.global writes a, which is registered as read-only"),
    "BarrierInHalfAWarp": ("deadlock", r"threads wait for barrier 0 \(64 of 128 arrived\) at planted.cuh"),
    "ShuffleInHalfAWarp": ("deadlock", "threads wait for shfl.xor at planted.cuh"),
    "BarrierFromTwoPlaces": ("divergence", "lanes of warp 0|1|2|3 reach barrier 0 from different places"),
    "NobodySetsTheFlag": ("livelock", "threads wait for ld.acquire at planted.cuh"),
}


@pytest.mark.parametrize("bug", ALWAYS)
def test_caught_in_every_schedule(sim, problem, bug):
    kind, message = ALWAYS[bug]
    for schedule in SCHEDULES[:: 1 if bug != "NobodySetsTheFlag" else 4]:
        got, detail = outcome(sim, problem, bug, **schedule)
        assert got == kind, (schedule, detail)
        assert message is None or re.search(message, detail), detail


# What is left to chance or to the completion mode: caught by at least one schedule, and by which modes every time.
def test_a_missing_fence_shows_when_stores_are_late(sim, problem):
    outcomes = {(s["seed"], s["completion"]): outcome(sim, problem, "NoFence", **s)[0] for s in SCHEDULES}
    assert all(got == "wrong result" for (_, completion), got in outcomes.items() if completion == "late"), outcomes
    assert all(got == "ok" for (_, completion), got in outcomes.items() if completion == "eager"), outcomes


RACES = ("WaitForTooLittle", "NoBarrierAfterWait", "NoBarrierBeforeRefill")


@pytest.mark.parametrize("bug", RACES)
def test_without_the_race_check_some_schedules_find_it(sim, problem, bug):
    """What the interleavings alone find: the numbers go wrong in some of them."""
    found = [s for s in SCHEDULES if outcome(sim, problem, bug, check_races=False, **s)[0] == "wrong result"]
    assert found


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("pitch", [4, 8, 16])
def test_races_are_told_apart_within_sixteen_bytes(sim, pitch, seed):
    """Neighbours that read and then write each its own word do not race, though they share a line; with the next one's they do."""
    out = np.zeros(32, np.int32)
    sim.run("own_words", [], out, [0, pitch], grid=1, block=32, smem_bytes=512, seed=seed)
    assert (out == np.arange(32)).all()
    for shift in (1, 31):
        with pytest.raises(sim.SimulatorError, match="race: .*nothing orders the two"):
            sim.run("own_words", [], out, [shift, pitch], grid=1, block=32, smem_bytes=512, seed=seed)


def test_a_loop_that_calls_no_wrapper_is_ended(sim, problem):
    got, detail = outcome(sim, problem, "LoopsForever", hang_seconds=1)
    assert got == "hang" and "called no wrapper for 1 seconds" in detail and "planted.cuh" in detail


@pytest.mark.parametrize("bug", ["None", "NoBarrierAfterWait", "BarrierInHalfAWarp", "NobodySetsTheFlag", "PlainLoadOutOfGlobal", "LoopsForever"])
def test_the_fibers_of_other_processors(problem, bug):
    """ucontext in place of our own switch: scheduling, the fault handler's way out of a signal, the watch on loops."""
    sim = build.module("_sim_tests", ucontext=True)
    for schedule in SCHEDULES[::4]:
        got, detail = outcome(sim, problem, bug, hang_seconds=1, **schedule)
        assert got == {"None": "ok", "LoopsForever": "hang"}.get(bug) or got == ALWAYS[bug][0], detail


def test_all_planted_bugs_are_covered():
    text = (build.ROOT / "tests" / "sim" / "planted.cuh").read_text()
    names = set(re.findall(r"X\((\w+)\)", text)) - {"bug"}
    assert names == {"None", "NoFence", "LoopsForever", *ALWAYS}


# ---- what a test can hold a kernel to ----


def test_totals_count_bytes_conflicts_and_work(sim, problem):
    _, totals = outcome(sim, problem, "None")
    assert totals["global_to_shared_bytes"] == (ROWS + 64) * K * 2
    assert totals["mma_flops"] == 2 * 64 * 64 * K
    # Per 16 of k: one ldmatrix.x4 of a and four of b in each of four warps, of four matrices each.
    assert totals["ldmatrix_wavefronts"] == K // 16 * 4 * 5 * 4 and totals["ldmatrix_conflicts"] == 0
    assert totals["shared_load_bytes"] == K // 16 * 4 * 5 * 4 * 128 + 4 * GRID * 128  # and is_last
    assert totals["ctas"] == GRID
    _, totals = outcome(sim, problem, "NoSwizzle")
    assert totals["ldmatrix_conflicts"] > 0


def test_profile_counts_conflicts_and_sectors_by_line(sim, problem):
    """Rows of 64 bytes: eight threads fill two rows with 16-byte copies, at the swizzled places without a conflict."""
    _, totals = outcome(sim, problem, "None", profile=True, seed=1, completion="random")
    copies = {kind: next(t for line, t in totals["lines"].items() if line.startswith("planted.cuh") and line.endswith(kind) and t["bytes"] == 64 * K * 2)
              for kind in ("copy to shared", "copy from global")}  # fmt: skip
    requests = 64 * K * 2 // 16 // 32  # of b: 32 lanes, 16 bytes each
    assert copies["copy to shared"] == {"requests": requests, "bytes": 64 * K * 2, "wavefronts": 4 * requests, "conflicts": 0, "sectors": 0}
    # Each row of a stage is 64 bytes in global memory: two full sectors.
    assert copies["copy from global"]["sectors"] == 64 * K * 2 // 32
    stores = next(t for line, t in totals["lines"].items() if line.endswith("global store") and t["bytes"] == GRID * 64 * 64 * 4)
    assert stores["sectors"] == 8 * stores["requests"], "eight rows, every other float of eight: each touches one sector per row"


def test_the_same_seed_is_the_same_run(sim, problem):
    first, second, other = (outcome(sim, problem, "None", seed=s, completion="random")[1] for s in (7, 7, 8))
    assert first == second and first["switches"] != other["switches"]


# ---- launches ----


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"smem_bytes": 164 << 10}, "167936 bytes of dynamic shared memory; sm_80 has 166912 per CTA"),
        ({"smem_bytes": 100 << 10, "arch": 86, "ctas_per_sm": 1}, "102400 bytes of dynamic shared memory; sm_86 has 101376 per CTA"),
        ({"smem_bytes": 90 << 10}, "2 CTAs of 92160 bytes do not fit the 167936 bytes of an SM"),
        ({"block": 1056}, "1056 threads per CTA; 1 to 1024 are possible"),
        ({"block": (4, 4, 65)}, "1040 threads per CTA|blockDim.z is 65"),
        ({"block": 0}, "0 threads per CTA"),
        ({"grid": (1, 65536)}, "grid .y, z. = .65536, 1., at most 65535"),
        ({"grid": 0}, "an empty grid"),
        ({"block": 1024, "ctas_per_sm": 3}, "3 CTAs of 1024 threads on an SM of 2048"),
        ({"arch": 70}, "no limits known for arch 70"),
    ],
    ids=str,
)
def test_launches_that_hardware_refuses(sim, problem, settings, message):
    kind, detail = outcome(sim, problem, "None", **settings)
    assert kind == "launch" and re.search(message, detail), detail


def test_unknown_settings_are_refused(sim, problem):
    with pytest.raises(TypeError, match="unknown launch setting sed"):
        outcome(sim, problem, "None", sed=1)
    with pytest.raises(ValueError, match="completion must be late, eager or random, got soon"):
        outcome(sim, problem, "None", completion="soon")


def test_more_blocks_than_fit_run_one_after_another(sim):
    """A relay among more blocks than are alive at once cannot finish: the report says who waits. Fewer can."""
    with pytest.raises(sim.SimulatorError, match=r"livelock.*\n  2 threads wait for ld.acquire at kernels.cuh"):
        sim.run("relay", [], np.zeros(17, np.int32), [], grid=16, block=32, num_sms=2, ctas_per_sm=1, livelock_polls=1000)
    out = np.zeros(17, np.int32)
    sim.run("relay", [], out, [], grid=16, block=32, num_sms=8, ctas_per_sm=2)
    assert out[0] == 16


def test_an_error_leaves_the_simulator_usable(sim, problem):
    for _ in range(20):
        assert outcome(sim, problem, "BarrierInHalfAWarp")[0] == "deadlock"
        assert outcome(sim, problem, "PlainLoadOutOfGlobal")[0] == "out_of_bounds"
    assert outcome(sim, problem, "None")[0] == "ok"


def test_guarded_buffers_from_python(sim):
    """Memory for callers that let a kernel touch it by plain loads: numpy writes it, the pages around it are not accessible."""
    buffer = sim.GuardedBuffer("x", 100)
    view = np.asarray(buffer)
    view[:] = 7
    assert view.nbytes == 100 and view.ctypes.data == buffer.address and buffer.address % 16 == 0
