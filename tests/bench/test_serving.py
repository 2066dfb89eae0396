"""Workloads, the driver, the metrics, and the HTTP client against a server that keeps time."""

import argparse
import http.server
import json
import threading
import time

import numpy as np
import pytest

from bench import engine, openai_client, workload
from bench.serving import Served, parse_goodput, summarize
from bench.workload import Arrival


class FakeEngine:
    """One token per running request and step; prompts take a step per 100 tokens. Time is the number of steps."""

    vocab_size = 100

    def __init__(self):
        self.now, self.running, self.log = 0.0, {}, []

    def clock(self):
        return self.now

    def add(self, index, prompt, output_len):
        self.running[index] = [-(-len(prompt) // 100) - 1, output_len]
        self.log.append((self.now, index, len(prompt)))

    def step(self):
        self.now += 1.0
        new = []
        for index, state in list(self.running.items()):
            if state[0] > 0:
                state[0] -= 1
                continue
            state[1] -= 1
            new.append((index, 1))
            if not state[1]:
                del self.running[index]
        return new


def test_driver_measures_each_request_from_its_arrival():
    fake = FakeEngine()
    arrivals = [Arrival(0.0, None, 100, 3), Arrival(0.5, None, 300, 2), Arrival(None, 3, 50, 1)]
    served = engine.drive(fake, arrivals, workload.prompts(arrivals, 100), clock=fake.clock)
    assert [n for *_, n in fake.log] == [100, 300, 50]
    assert served[0].token_times == [1.0, 2.0, 3.0] and served[0].ttft == 1.0 and served[0].itl == [1.0, 1.0]
    assert served[1].start == 0.5, "the wait for the step under way counts"
    assert served[1].ttft == 3.5 and served[1].latency == 4.5
    assert served[2].start == 3.0, "it arrives once three tokens are out"


def test_driver_does_not_wait_for_ever():
    fake = FakeEngine()
    with pytest.raises(RuntimeError, match="wait for more tokens"):
        engine.drive(fake, [Arrival(0.0, None, 10, 2), Arrival(None, 99, 10, 1)], [[1] * 10, [1] * 10], clock=fake.clock)


def test_metrics_by_hand_and_in_the_field_names_of_vllm():
    served = [Served(10, 0.0, [1.0, 1.5, 2.5]), Served(20, 1.0, [2.0]), Served(30, 0.5, [], "lost")]
    result = summarize(served, slo={"ttft": 1.0, "itl": 0.6})
    assert (result["completed"], result["failed"], result["total_input_tokens"], result["total_output_tokens"]) == (2, 1, 30, 4)
    assert result["duration"] == 2.5 and result["output_throughput"] == 1.6 and result["total_token_throughput"] == 13.6
    assert result["mean_ttft_ms"] == 1000 and result["median_itl_ms"] == 750 and result["mean_tpot_ms"] == 750
    assert result["p99_itl_ms"] == pytest.approx(np.percentile([500, 1000], 99))
    assert result["request_goodput"] == pytest.approx(1 / 2.5), "the first request has a gap of a second"
    assert result["median_e2el_ms"] == 1750 and result["ttfts"] == [1.0, 1.0, None] and result["errors"][2] == "lost"
    fields = {f"{kind}_{name}_ms" for kind in ("mean", "median", "std", "p99") for name in ("ttft", "tpot", "itl", "e2el")}
    assert fields <= result.keys()


def test_nothing_completed_says_why():
    with pytest.raises(ValueError, match="none of 1 requests completed: refused"):
        summarize([Served(1, 0.0, [], "refused")], slo={})


def test_goodput_argument():
    assert parse_goodput("ttft:2000,itl:50") == {"ttft": 2.0, "itl": 0.05} and parse_goodput(None) == {}
    with pytest.raises(ValueError, match="'tbt:1'"):
        parse_goodput("tbt:1")


def test_the_fixed_scenario():
    arrivals = workload.interruption()
    assert [(a.prompt_len, a.output_len) for a in arrivals] == [(512, 64)] * 8 + [(1500, 64)] * 2
    assert {a.after_tokens for a in arrivals[8:]} == {160} and all(a.at == 0.0 for a in arrivals[:8])


def test_poisson_has_its_rate_and_its_seed():
    arrivals = workload.poisson("sharegpt_8k", 4.0, 2000, seed=1, limit=4096)
    gaps = np.diff([a.at for a in arrivals])
    assert arrivals[0].at == 0.0 and gaps.mean() == pytest.approx(0.25, rel=0.1)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1), "exponential gaps: deviation equals mean"
    assert all(0 < a.prompt_len + a.output_len <= 4096 for a in arrivals)
    assert arrivals[:50] == workload.poisson("sharegpt_8k", 4.0, 50, seed=1, limit=4096)
    smooth = np.diff([a.at for a in workload.poisson("sharegpt_8k", 4.0, 2000, burstiness=16.0)])
    assert smooth.std() < 0.4 * smooth.mean()


def test_traces_replay_at_their_own_times():
    arrivals = workload.replay("azure_conv", 100, speed=2.0)
    rows = workload.load_lengths("azure_conv")
    assert arrivals[1] == Arrival((rows[1][0] - rows[0][0]) / 2, None, *rows[1][1:])
    with pytest.raises(ValueError, match="no arrival times"):
        workload.replay("arxiv_4k", 10)
    with pytest.raises(ValueError, match="arxiv_4k, azure_conv, sharegpt_8k"):
        workload.load_lengths("nothing")


def test_extracts_are_small_and_attributed():
    size = sum(path.stat().st_size for path in workload.TRACES.iterdir())
    readme = (workload.TRACES / "README.md").read_text()
    assert size < 300_000
    assert all(path.name in readme for path in workload.TRACES.glob("*.csv"))


def test_prompts_have_their_lengths_and_differ():
    arrivals = workload.interruption()
    prompts = workload.prompts(arrivals, 49152)
    assert [len(p) for p in prompts] == [a.prompt_len for a in arrivals]
    assert len({tuple(p[:16]) for p in prompts}) == len(prompts) and all(0 < t < 49152 for p in prompts for t in p)


class Server(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible completion stream: a token every 5 ms; prompts of length 13 fail."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        if len(body["prompt"]) == 13:
            self.send_response(400)
            payload = b'{"error": "unlucky"}'
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for i in range(body["max_tokens"]):
            time.sleep(0.005)
            event = {"choices": [{"text": f" t{i}", "finish_reason": None}]}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    httpd.seen = []
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield httpd, f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()


def test_http_client_streams_triggers_and_reports_errors(server):
    httpd, url = server
    arrivals = [Arrival(0.0, None, 5, 12), Arrival(0.02, None, 13, 4), Arrival(None, 6, 7, 3)]
    served = openai_client.drive(url, "m", arrivals, workload.prompts(arrivals, 5000))
    assert len(served[0].token_times) == 12 and not served[0].error
    assert served[1].error.startswith("ValueError: HTTP 400") and "unlucky" in served[1].error
    assert len(served[2].token_times) == 3
    assert served[2].start >= served[0].token_times[5] - 1e-3, "it waits for six tokens of the others"
    assert served[0].ttft >= 0.005 and min(served[0].itl) >= 0.0
    body = httpd.seen[0]
    assert body["stream"] and body["ignore_eos"] and body["max_tokens"] == 12 and len(body["prompt"]) == 5
    result = summarize(served, slo={})
    assert (result["completed"], result["failed"]) == (2, 1)


def test_a_server_that_is_not_there_is_an_error_of_each_request():
    arrivals = [Arrival(0.0, None, 5, 2)]
    (served,) = openai_client.drive("http://127.0.0.1:9", "m", arrivals, [[1] * 5])
    assert served.error and not served.token_times


def test_engine_run_keeps_every_repeat(monkeypatch):
    from bench.__main__ import parser

    fake = FakeEngine()
    monkeypatch.setattr(engine, "variants", lambda args: [("fake", {"token_budget": 7}, lambda: fake)])
    monkeypatch.setattr(engine.time, "perf_counter", fake.clock)
    monkeypatch.setattr(engine.drive, "__defaults__", (fake.clock,))
    args = parser().parse_args(["engine", "--repeats", "2", "--goodput", "ttft:900000"])
    report = engine.run(args, log=lambda line: None)
    assert [entry["repeat"] for entry in report.engine] == [0, 1]
    entry = report.engine[0]
    assert entry["backend"] == "fake" and entry["options"] == {"token_budget": 7} and entry["num_prompts"] == 10
    assert entry["total_output_tokens"] == 640 and entry["request_goodput"] is not None


def test_engines_asked_for(monkeypatch):
    args = argparse.Namespace(
        engine="ours,openvino,vllm", policy="sarathi,prefill_first", dtype="auto,float32", budget=256, linear="dense", num_pages=64, backend=None
    )
    found = [(label, options.get("token_budget")) for label, options, _ in engine.variants(args)]
    assert found == [("ours sarathi", 256)] * 2 + [("ours prefill_first", None)] * 2 + [("openvino genai", 256), ("vllm cpu", 256)]
    args.engine = "theirs"
    with pytest.raises(ValueError, match="'theirs'"):
        engine.variants(args)
