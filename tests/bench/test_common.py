"""The timing function, the roofline formulas and the machine record."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch

from bench import cases, machine, roofline
from bench.common import Timing, _CpuSampler, measure, statistic
from sarathi_kernels import AttentionSpec
from sarathi_kernels.plan import plan


def test_statistic_is_the_median_with_its_spread():
    assert statistic([5.0, 1.0, 9.0, 2.0, 3.0]) == Timing(3.0, 1.0, 9.0, 5)


def test_measure_interleaves_rotates_and_orders():
    log = []
    calls = {"a": [lambda: log.append("a0"), lambda: log.append("a1")], "b": [lambda: log.append("b0")]}
    timings = measure(calls, "cpu", seconds=0.0, min_rounds=4)
    assert log[:3] == ["a0", "a1", "b0"]  # one untimed call of each
    rounds = [log[3 + 2 * r : 5 + 2 * r] for r in range(4)]
    assert all({call[0] for call in r} == {"a", "b"} for r in rounds), "competitors must be interleaved"
    assert [next(c for c in r if c[0] == "a") for r in rounds] == ["a0", "a1", "a0", "a1"], "input sets must rotate"
    assert {r[0][0] for r in rounds} == {"a", "b"}, "nobody may always go first"
    assert all(t.rounds == 4 and 0 <= t.us_min <= t.us <= t.us_max for t in timings.values())


def test_everybody_follows_everybody():
    log = []
    measure({name: [lambda name=name: log.append(name)] for name in "abcd"}, "cpu", seconds=0.0, min_rounds=24)
    followed = {(log[4 * r + i], log[4 * r + i + 1]) for r in range(1, 25) for i in range(3)}
    assert followed == {(a, b) for a in "abcd" for b in "abcd" if a != b}


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this system has no /proc/self/schedstat to read thread times from")
def test_no_pool_runs_on_into_the_next_call():
    def others():
        """Nanoseconds that each thread but this one has run."""
        tasks = Path("/proc/self/task").iterdir()
        return {t.name: int((t / "schedstat").read_text().split()[0]) for t in tasks if int(t.name) != threading.get_native_id()}

    x = torch.ones(4_000_000)
    sampler = _CpuSampler()
    for _ in range(5):
        x.add_(1)  # on torch's threads, which then look for more
        sampler.settle()
        before = others()
        time.sleep(0.005)
        ran = sum(others().values()) - sum(before.values())
        assert ran < 1_000_000, f"other threads ran {ran / 1e6:.1f} ms in a pause of 5 ms"


def test_measure_tells_slow_from_fast_in_microseconds():
    timings = measure({"slow": [lambda: time.sleep(0.02)], "fast": [lambda: time.sleep(0.005)]}, "cpu", seconds=0.0, min_rounds=3)
    assert 20_000 <= timings["slow"].us_min <= 60_000
    assert timings["slow"].us > 1.5 * timings["fast"].us


def test_a_slow_competitor_drops_out_and_a_fast_one_goes_on():
    timings = measure({"slow": [lambda: time.sleep(0.02)], "fast": [lambda: None]}, "cpu", seconds=0.05, min_rounds=2, max_rounds=8)
    assert timings["slow"].rounds < timings["fast"].rounds == 8


def test_patience_ends_before_the_rounds_do(monkeypatch):
    monkeypatch.setattr("bench.common.PATIENCE_SECONDS", 0.03)
    timings = measure({"oracle": [lambda: time.sleep(0.02)], "fast": [lambda: None]}, "cpu", seconds=0.0, min_rounds=6)
    assert timings["oracle"].rounds == 2 and timings["fast"].rounds == 6


def test_measure_refuses_a_competitor_without_calls():
    with pytest.raises(ValueError, match="'b': 0"):
        measure({"a": [lambda: None], "b": []}, "cpu")


@pytest.mark.parametrize("window_left", [-1, 5, 40])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_work_agrees_with_the_plan_s_cost(window_left, causal):
    """Two independent counts of the same operations: the formula here, and the rows of the plan's work items."""
    spec = AttentionSpec(8, 2, 64, window_left=window_left, causal=causal)
    requests = [(33, 90), (1, 75), (5, 18)]
    q_lens = torch.tensor([0, *(q for q, _ in requests)]).cumsum(0).to(torch.int32)
    kv_lens = torch.tensor([n for _, n in requests], dtype=torch.int32)
    table = torch.arange(30, dtype=torch.int32).view(3, 10)
    cost = plan(spec, q_lens, kv_lens, table, backend="reference").cost()
    assert roofline.attention_work(spec, requests).flops == float(cost.flops.sum())


def test_attention_work_of_the_named_cases():
    """By hand: A is 512 rows over 4,096 + themselves, and 32 decodes over 2,048 keys."""
    spec = cases.PERFORMANCE_CASES["A/llama8b"].with_dtype(torch.bfloat16)
    work = roofline.attention_work(spec, cases.NAMED["A"])
    pairs = 512 * 4096 + 512 * 513 // 2 + 32 * 2048
    assert work.flops == 4 * 32 * 128 * pairs
    assert work.bytes == (4608 + 32 * 2048) * 8 * 128 * 2 * 2 + 2 * (512 + 32) * 32 * 128 * 2


def test_the_floor_is_the_larger_of_the_two():
    ceilings = roofline.Ceilings({"float32": 2.0}, 100.0)
    assert roofline.Work(4e12, 1.0).floor_us(ceilings, torch.float32) == pytest.approx(2e6)
    assert roofline.Work(1.0, 1e9).floor_us(ceilings, torch.float32) == pytest.approx(1e4)
    with pytest.raises(KeyError, match="bfloat16"):
        ceilings.tflops(torch.bfloat16)


def test_ceilings_keep_the_best():
    a, b = roofline.Ceilings({"float32": 2.0}, 10.0), roofline.Ceilings({"float32": 1.0, "bfloat16": 4.0}, 20.0)
    assert a.joined(b) == roofline.Ceilings({"float32": 2.0, "bfloat16": 4.0}, 20.0)


def test_machine_record_is_json_and_has_a_line():
    record = machine.machine_record("cpu")
    assert json.loads(json.dumps(record)) == record
    assert record["packages"]["torch"] == torch.__version__ and record["gpu"] is None
    line = machine.machine_line(record)
    assert record["cpu"] in line and record["commit"] in line and "\n" not in line
