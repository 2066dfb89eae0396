"""Tables and plots from results, and the visit to a GPU machine as far as a machine without one can check it."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu, gpu_build, plots, report
from bench.rows import Report, add_ratios

ROOT = Path(__file__).parent.parent.parent
MACHINE = {
    "cpu": "Test CPU", "cores": 2, "isa": ["avx2"], "gpu": None, "packages": {"torch": "2"}, "threads": 2, "commit": "abc", "date": "today",
    "ceilings": {"matmul_tflops": {"bfloat16": 0.4}, "read_gbps": 30.0},
}  # fmt: skip


def make_row(case, backend, us, **changes):
    row = {
        "subject": "attention", "case": case, "backend": backend, "dtype": "bfloat16", "us": us, "us_min": 0.9 * us, "us_max": 1.1 * us,
        "tflops": 100.0 / us, "gbps": 500.0 / us, "roof_us": 40.0, "roof_fraction": 40.0 / us, "ratio": {}, "max_err": 1e-4,
    }  # fmt: skip
    return row | changes


def make_report():
    rows = []
    for i, case in enumerate(f"c{c}@{p}+{d}/llama8b" for c in (256, 512) for p in (0, 4096) for d in ("32@1024", "128@4096")):
        one = [make_row(case, "cpu", 100.0 + i), make_row(case, "openvino", 150.0), make_row(case, "sdpa", 90.0 if i == 3 else 700.0)]
        add_ratios(one, {"openvino", "sdpa"})
        rows += one
    engine = [
        {
            "backend": f"ours {policy}", "workload": "w", "options": {"token_budget": 256}, "num_prompts": 2, "duration": 3.0, "repeat": repeat,
            "output_throughput": 50.0 + repeat, "total_token_throughput": 500.0, "median_ttft_ms": 1500.0, "p99_ttft_ms": 1900.0,
            "median_itl_ms": 30.0, "p99_itl_ms": 200.0, "median_e2el_ms": 2500.0, "request_goodput": None,
            "start_times": [0.0, 0.5], "ttfts": [1.0, None], "itls": [[0.03, 0.2, 0.03], []],
        }
        for policy in ("sarathi", "prefill_first") for repeat in range(3)
    ]  # fmt: skip
    mixed = [{"case": "A/x", "backend": "cpu", "dtype": "bfloat16", "mixed_us": 10.0, "prefill_us": 6.0, "decode_us": 5.0, "over_max": 1.667, "over_sum": 0.909}]
    return Report(dict(MACHINE), rows, mixed, {"fa3": "runs on cuda, not on cpu"}, [{"case": "A/x", "backend": "bad", "dtype": "bfloat16", "why": "off by 3"}], engine)


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_report_has_every_table_and_plot(tmp_path):
    make_report().save(tmp_path / "run.json")
    written = report.write([tmp_path / "run.json"], tmp_path)
    names = {path.name for path in written}
    assert names == {"report.md", "roofline_bfloat16.png", "heat_map_llama8b_bfloat16.png", "tbt_cdf.png", "timeline.png"}
    for path in written[1:]:
        width, height = png_size(path)
        assert width > 500 and height > 200
    text = written[0].read_text()
    assert "Test CPU" in text and "read 30 GB/s" in text and "fa3: runs on cuda" in text and "off by 3" in text
    assert "| c256@0+32@1024/llama8b | **100** [90.0-110] |" in text, "many cases: one line each; the fastest of a case is bold"
    assert "| **90.0** [81.0-99.0] |" in text, "the case where a peer wins shows the peer in bold"
    assert "1.50x openvino" in text and "0.87x sdpa" in text, "the best peer of each case, not the best case"
    assert "51.0 [50.0-52.0]" in text, "median and spread over the repeats of an engine"
    assert "| A/x | cpu | bfloat16 | 0.0100 | 0.0060 | 0.0050 | 1.667 | 0.909 |" in text


def test_ours_come_first_then_peers_by_speed():
    full = make_report()
    (head,) = [line for line in report.tables(full) if line.startswith("| us |")]
    assert [name.strip() for name in head.split("|")[2:5]] == ["cpu", "openvino", "sdpa"]
    full.rows = [row | {"us": 1e3 * row["us"], "us_min": 1e3 * row["us_min"], "us_max": 1e3 * row["us_max"]} for row in full.rows[:6]]
    lines = report.tables(full)
    first = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert first[0] == "ms" and first[2:5] == ["cpu", "openvino", "sdpa"], "few cases: one column each"


def test_nothing_to_draw_draws_nothing(tmp_path):
    assert plots.draw_all([Report(dict(MACHINE))], tmp_path) == []


def test_milliseconds_keep_three_digits():
    assert [report.milliseconds(us) for us in (12.34, 456.7, 7890.0, 123456.7, 12345678.0)] == ["0.0123", "0.457", "7.89", "123.5", "12346"]


# ---- make gpu


def test_dry_run_says_why_each_step_was_skipped(tmp_path):
    """The whole command on a machine without a GPU: exit 0, a status table, true reasons."""
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvidia-smi").exists())
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PATH": path}, timeout=100)
    assert result.returncode == 0, result.stdout + result.stderr
    status = (tmp_path / "out" / "status.md").read_text()
    for step in ("build", "tests", "memcheck", "racecheck", "micro", "attention", "append_kv", "plan", "grid"):
        assert f"| {step} | skipped | 0.0 | no NVIDIA GPU here: nvidia-smi is not on PATH |" in status
    assert "| machine | ok" in status and "| report | skipped | 0.0 | no step left results |" in status
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"status.md", "log.txt"}


def test_a_step_that_fails_or_hangs_does_not_stop_the_visit(tmp_path):
    clock = gpu.Visit(tmp_path, tmp_path, minutes=1.0, say=lambda line: None)
    python = sys.executable
    assert not clock.run(gpu.Step("fails", 20, [python, "-c", "print('the reason'); raise SystemExit(3)"]))
    hang = "import subprocess, sys; print('half', flush=True); subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    assert not clock.run(gpu.Step("hangs", 4, [python, "-c", hang]))
    assert not clock.run(gpu.Step("absent", 20, ["/no/such/program"]))
    assert not clock.run(gpu.Step("unneeded", 20, [python, "-c", ""], (lambda: "because",)))
    assert clock.run(gpu.Step("works", 20, [python, "-c", "print('fine')"]))
    assert [o.result for o in clock.outcomes] == ["failed", "timed out", "failed", "skipped", "ok"]
    status, log = (tmp_path / "status.md").read_text(), (tmp_path / "log.txt").read_text()
    assert "exit 3: the reason" in status and "because" in status and "half" in log and "fine" in log
    assert clock.outcomes[1].seconds < 10


def test_no_step_starts_without_time(tmp_path):
    clock = gpu.Visit(tmp_path, tmp_path, minutes=0.5, say=lambda line: None)
    assert not clock.run(gpu.Step("late", 20, [sys.executable, "-c", ""]))
    assert "no time left" in clock.outcomes[0].detail


PTXAS = """
ptxas info    : Compiling entry function '_Z9attentionILi128EEvv' for 'sm_90a'
ptxas info    : Function properties for _Z9attentionILi128EEvv
    16 bytes stack frame, 24 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 16 bytes stack, 1024 bytes smem, 640 bytes cmem[0]
ptxas info    : Compiling entry function '_Z5mergev' for 'sm_80'
ptxas info    : Function properties for _Z5mergev
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, 400 bytes cmem[0]
"""


def test_registers_and_spills_are_read_from_the_build_log():
    attention, merge = gpu.kernel_resources(PTXAS)
    assert attention == {
        "symbol": "_Z9attentionILi128EEvv", "arch": "sm_90a", "registers": 168, "stack": 16, "spill_stores": 24, "spill_loads": 32, "smem": 1024
    }  # fmt: skip
    assert (merge["registers"], merge["spill_stores"], merge["smem"]) == (32, 0, 0)
    table = gpu.build_table(PTXAS).splitlines()
    assert table[4].endswith("| sm_90a | 168 | 16 | 24 | 32 | 1024 |"), "kernels that spill come first"


def test_gpu_is_named_for_the_build(monkeypatch, tmp_path):
    fake = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for answer, want in (("9.0, NVIDIA H100 80GB HBM3", ("90a", "NVIDIA H100 80GB HBM3")), ("8.0, NVIDIA A100", ("80", "NVIDIA A100"))):
        fake.write_text(f"#!/bin/sh\necho '{answer}'\n")
        fake.chmod(0o755)
        assert gpu.find_gpu() == want
    fake.write_text("#!/bin/sh\necho no devices\nexit 6\n")
    arch, why = gpu.find_gpu()
    assert arch is None and "no devices" in why


def test_build_arguments(tmp_path):
    """The same variables that setup.py gives CMake: a build for one GPU, and one without CUDA."""
    text = " ".join(gpu_build.cmake_arguments(tmp_path, nvcc="/cuda/nvcc", archs="90a"))
    assert "-DSARATHI_CUDA=ON" in text and "-DSARATHI_CUDA_ARCHS=90a" in text
    assert "-DSARATHI_CUDA=OFF" in " ".join(gpu_build.cmake_arguments(tmp_path, nvcc=None, archs=None))
    known = (ROOT / "setup.py").read_text() + (ROOT / "CMakeLists.txt").read_text()
    for argument in gpu_build.cmake_arguments(tmp_path, nvcc="/cuda/nvcc", archs="90a"):
        if argument.startswith("-DSARATHI"):
            assert argument[2:].split("=")[0] in known, "the build knows no such variable"


def test_collected_visit_fits_into_eight_files(tmp_path):
    from bench import gpu_collect

    raw, out = tmp_path / "raw", tmp_path / "out"
    out.mkdir()
    make_report().save(raw / "attention.json")
    make_report().save(raw / "grid.json")
    (raw / "micro.json").write_text(json.dumps({"copy_gbps": 1.0}))
    for name in ("status.md", "log.txt", "build.md"):
        (out / name).write_text("x")
    assert gpu_collect.main(out, sorted(raw.glob("*.json")), rows_only=True) == 0
    assert {p.name for p in out.iterdir()} == {"status.md", "log.txt", "build.md", "bench.json", "micro.json"}
    assert gpu_collect.main(out, sorted(raw.glob("*.json"))) == 0
    names = {p.name for p in out.iterdir()}
    assert names == {"status.md", "log.txt", "build.md", "bench.json", "micro.json", "report.md", "roofline_bfloat16.png", "heat_map_llama8b_bfloat16.png"}
    assert len(names) <= gpu.MAX_FILES and len(Report.load(out / "bench.json").rows) == 2 * len(make_report().rows)
    text = (out / "report.md").read_text()
    assert "heat_map" in text and "timeline" not in text, "the report shows only the pictures that came along"


def test_stream_kernel_compiles_for_the_gpus(monkeypatch):
    """The microbenchmark's only kernel, compiled offline: what cannot run here can at least not fail to build there."""
    triton = pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets kernels in this process")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bench import gpu_micro

    signature = {"source": "*fp32", "sink": "*fp32", "num_blocks": "i32", "BLOCK": "constexpr"}
    source = ASTSource(fn=gpu_micro._stream, signature=signature, constexprs={"BLOCK": gpu_micro.BLOCK}, attrs={(0,): [["tt.divisibility", 16]]})
    for arch in (80, 90):
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 8})
        ptx = compiled.asm["ptx"]
        assert "cp.async" in ptx and ".v4" in ptx or "cp.async.cg.shared.global" in ptx, f"sm_{arch}: the loads must be pipelined, 16 bytes wide"
