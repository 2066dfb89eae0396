"""The subjects end to end at sizes that cost nothing: rows, ratios, refusals, files; and the peers that this machine has."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import append_kv, attention, cases, peers, plan, roofline
from bench.__main__ import main
from bench.peers import Peer
from bench.rows import ROW_KEYS, Report
from sarathi_kernels import backends, testing

ROOT = Path(__file__).parent.parent.parent
TINY = testing.Case("c20@25+2@33/smollm2", ((20, 45), (1, 33), (1, 16)), cases.MODELS["smollm2"])
FAST = {"seconds": 0.0, "min_rounds": 2, "log": lambda line: None}


@pytest.fixture
def tiny_case(monkeypatch):
    monkeypatch.setitem(cases.PERFORMANCE_CASES, TINY.name, TINY)
    monkeypatch.setattr("bench.roofline.READ_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr("bench.roofline.MATMUL_SIZE", {"cpu": 64})
    for cached in (roofline.probes, roofline._read_buffer):
        cached.cache_clear()
    yield TINY
    for cached in (roofline.probes, roofline._read_buffer):
        cached.cache_clear()


def test_rows_have_the_published_schema_and_ratios(tiny_case, tmp_path):
    path = tmp_path / "rows.json"
    assert main(["attention", "--backend", "cpu,reference,sdpa", "--cases", TINY.name, "--dtype", "bfloat16", "--seconds", "0", "--json", str(path)]) == 0
    data = json.loads(path.read_text())
    assert [row["backend"] for row in data["rows"]] == ["cpu", "reference", "sdpa"]
    by_name = {row["backend"]: row for row in data["rows"]}
    for row in data["rows"]:
        assert tuple(row) == ROW_KEYS and row["subject"] == "attention" and row["case"] == TINY.name and row["dtype"] == "bfloat16"
        assert 0 < row["us_min"] <= row["us"] <= row["us_max"] and row["max_err"] < 0.05
        assert row["roof_fraction"] == pytest.approx(row["roof_us"] / row["us"], abs=1e-3)
    assert by_name["cpu"]["ratio"]["sdpa"] == pytest.approx(by_name["sdpa"]["us"] / by_name["cpu"]["us"], rel=1e-3)
    assert by_name["sdpa"]["ratio"] == {}
    assert data["machine"]["ceilings"]["read_gbps"] > 0 and data["machine"]["packages"]["torch"]
    (mixed,) = data["mixed"]
    assert mixed["backend"] == "cpu" and mixed["over_sum"] < mixed["over_max"]
    assert mixed["over_sum"] == pytest.approx(mixed["mixed_us"] / (mixed["prefill_us"] + mixed["decode_us"]), rel=1e-3)


def test_a_red_check_gives_no_number(tiny_case, monkeypatch):
    def wrong(inputs):
        right = attention.our_call(inputs, "reference")
        return lambda: right() * 1.5

    def raises(inputs):
        raise RuntimeError("their fault")

    known = peers.all_peers() | {name: Peer(name, "", ("cpu",), "torch", prepare) for name, prepare in (("wrong", wrong), ("raises", raises))}
    monkeypatch.setattr(peers, "all_peers", lambda: known)
    report = attention.run([tiny_case], [torch.float32], names=["reference", "wrong", "raises"], **FAST)
    assert [row["backend"] for row in report.rows] == ["reference"]
    why = {r["backend"]: r["why"] for r in report.refused}
    assert "allowed" in why["wrong"] and why["raises"] == "RuntimeError: their fault"
    assert "wrong" not in report.rows[0]["ratio"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_result_that_is_not_finite_is_red(tiny_case, value):
    inputs = cases.device_inputs(tiny_case, torch.float32, "cpu")
    out = inputs.oracle()[0].float()
    oracle = attention.Oracle(inputs)
    oracle.check(out)
    out[11, 3, 5] = value
    with pytest.raises(attention.RedCheck, match="finite"):
        oracle.check(out)


def test_absent_peers_say_why(tiny_case):
    report = attention.run([tiny_case], [torch.float32], names=["reference", "fa3", "flashinfer_fa2", "cudnn"], **FAST)
    assert report.absent["fa3"] == "runs on cuda, not on cpu"
    assert set(report.absent) == {"fa3", "flashinfer_fa2", "cudnn"}
    missing = Peer("x", "", ("cpu",), "no_such_package", lambda inputs: None)
    assert missing.absent("cpu") == "no_such_package is not installed"
    with pytest.raises(ValueError, match="'cpux'"):
        attention.run([tiny_case], [torch.float32], names=["cpux"], **FAST)


@pytest.mark.parametrize("name", [n for n, p in peers.all_peers().items() if "cpu" in p.devices])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_peers_agree_with_the_oracle(name, dtype):
    """Every batch shape an adaptor must get right: chunks behind a prior, whole prompts, single tokens, part-filled pages."""
    peer = peers.all_peers()[name]
    if (why := peer.absent("cpu")) is not None:
        pytest.skip(why)
    if name == "flex":
        pytest.skip("compiles for half a minute: run by hand, `python -m bench attention --backend flex`")
    for requests in (TINY.requests, ((17, 17), (1, 40)), ((1, 33), (1, 64), (1, 5))):
        inputs = cases.device_inputs(testing.Case("x", requests, cases.MODELS["smollm2"]), dtype, "cpu")
        assert attention.Oracle(inputs).check(peer.prepare(inputs)()) < 0.05


def test_every_peer_of_the_issue_has_an_adaptor():
    names = set(peers.all_peers())
    assert {"sdpa", "sdpa_batched", "flex", "varlen_attn", "openvino", "vllm_cpu", "cudnn", "vllm_triton", "fa3", "fa3_splits"} <= names
    assert {"flashinfer_" + n for n in ("fa2", "fa3", "batch_attention", "pod", "batch_pod")} <= names


def test_peers_refuse_what_they_do_not_cover():
    spec = dataclasses.replace(cases.MODELS["smollm2"], window_left=4)
    inputs = cases.device_inputs(testing.Case("x", ((1, 20),), spec), torch.float32, "cpu")
    with pytest.raises(peers.Unsupported, match="plain causal"):
        peers.all_peers()["sdpa"].prepare(inputs)


def test_append_kv_rows(tiny_case):
    report = append_kv.run([tiny_case], [torch.float32], names=["cpu", "torch", "sdpa"], **FAST)
    assert [(row["case"], row["backend"]) for row in report.rows] == [(TINY.name + s, b) for s in ("", "+rope") for b in ("cpu", "torch")]
    assert report.rows[0]["max_err"] == 0.0 and report.rows[0]["ratio"].keys() == {"torch"}
    assert report.absent == {"sdpa": "has no append_kv adaptor"}


def test_plan_rows_grow_with_the_batch(monkeypatch):
    monkeypatch.setattr(plan, "REQUESTS", (4, 400))
    report = plan.run([torch.float32], names=["cpu"], **FAST)
    assert [row["case"] for row in report.rows] == ["4 requests", "400 requests"]
    assert report.rows[0]["us"] < report.rows[1]["us"]


def test_a_case_larger_than_memory_is_refused(tiny_case, monkeypatch):
    monkeypatch.setattr(attention, "_free_bytes", lambda device: 1000)
    report = attention.run([tiny_case], [torch.float32], names=["reference"], **FAST)
    assert not report.rows and "GiB are free" in report.refused[0]["why"]


def test_results_round_trip_and_merge(tmp_path):
    a = Report({"cpu": "x", "ceilings": {"matmul_tflops": {"float32": 1.0}, "read_gbps": 5.0}}, rows=[{"case": "A"}])
    a.extend(Report({"ceilings": {"matmul_tflops": {"bfloat16": 2.0}, "read_gbps": 3.0}}, rows=[{"case": "B"}], absent={"fa3": "no"}))
    assert a.machine["ceilings"] == {"matmul_tflops": {"float32": 1.0, "bfloat16": 2.0}, "read_gbps": 5.0}
    a.save(tmp_path / "a.json")
    assert Report.load(tmp_path / "a.json") == a
    (tmp_path / "b.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="b.json is not a benchmark result"):
        Report.load(tmp_path / "b.json")


def test_committed_results_load_and_name_their_machine():
    for path in (ROOT / "bench" / "results").rglob("*.json"):
        if path.stem != "micro":
            report = Report.load(path)
            assert report.machine["cpu"] and report.machine["commit"] != "unknown", path
            assert all(tuple(row) == ROW_KEYS for row in report.rows), path


def test_the_command_line_starts_without_a_gpu():
    result = subprocess.run([sys.executable, "-m", "bench", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and all(name in result.stdout for name in ("attention", "append_kv", "plan", "engine", "report", "quick"))
    assert set(backends.NAMES) >= {"cpu", "reference"}
