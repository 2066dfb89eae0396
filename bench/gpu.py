"""`make gpu`: one short visit to a machine with an NVIDIA GPU. Builds, tests, checks, measures, and leaves one folder of results.

Standard library only, and every step is a process of its own with a time limit: whatever fails, the rest still runs, and
status.md, log.txt and what has been measured are written after every step. Without a GPU the same command is a dry run that
says what each step is waiting for. Several visits share one build tree: --steps build,grid does only these.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORT_RESERVE_SECONDS = 35
LOG_BYTES = 4 << 20
MAX_FILES = 8
BUILD = ROOT / "build" / "gpu"


@dataclasses.dataclass
class Step:
    """One process.

    Attributes:
        name: also its heading in the log.
        limit: seconds, cut down to what is left of the visit.
        command: its arguments.
        needs: reasons why it cannot run here, as functions that return the reason or None.
        optional: its failure does not make the visit a failed one.
    """

    name: str
    limit: float
    command: list[str]
    needs: tuple[Callable[[], str | None], ...] = ()
    optional: bool = False
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Outcome:
    name: str
    result: str
    seconds: float
    detail: str = ""


class Visit:
    """Runs steps against one clock and keeps their outcomes and one log."""

    def __init__(self, out: Path, work: Path, minutes: float, say: Callable[[str], None] = print):
        self.out, self.work, self.say = out, work, say
        self.deadline = time.monotonic() + 60 * minutes
        self.outcomes: list[Outcome] = []
        self.log = bytearray()

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def run(self, step: Step, reserve: float = REPORT_RESERVE_SECONDS) -> bool:
        """Whether the step succeeded. Never raises for what the step does."""
        reason = next((why for need in step.needs if (why := need()) is not None), None)
        limit = min(step.limit, self.left - reserve)
        if reason is None and limit < 3:
            reason = f"no time left ({self.left:.0f} s, {reserve:.0f} s of them kept for the report)"
        if reason is not None:
            return self._end(Outcome(step.name, "skipped", 0.0, reason), b"")
        self.say(f"[{step.name}] at most {limit:.0f} s")
        began = time.monotonic()
        try:
            code, output = _bounded(step.command, limit, os.environ | step.environment)
        except OSError as error:
            return self._end(Outcome(step.name, "failed", time.monotonic() - began, str(error)), b"")
        seconds = time.monotonic() - began
        last = output.decode(errors="replace").strip().rsplit("\n", 1)[-1][-160:]
        result = "ok" if code == 0 else "timed out" if code is None else "failed"
        detail = last if code == 0 else f"stopped after {limit:.0f} s; what it had saved is kept" if code is None else f"exit {code}: {last}"
        return self._end(Outcome(step.name, result, seconds, detail), output)

    def _end(self, outcome: Outcome, output: bytes) -> bool:
        self.outcomes.append(outcome)
        self.say(f"[{outcome.name}] {outcome.result} {outcome.seconds:.0f} s  {outcome.detail}")
        self.log += f"\n===== {outcome.name}: {outcome.result}, {outcome.seconds:.1f} s =====\n".encode() + output[-LOG_BYTES // 4 :]
        self.save()
        return outcome.result == "ok"

    def save(self) -> None:
        """status.md and log.txt as of now, so that an interrupted visit leaves them too."""
        lines = ["| step | result | seconds | detail |", "| --- | --- | ---: | --- |"]
        lines += [f"| {o.name} | {o.result} | {o.seconds:.1f} | {o.detail.replace('|', '/')} |" for o in self.outcomes]
        (self.out / "status.md").write_text("# make gpu\n\n" + "\n".join(lines) + "\n")
        (self.out / "log.txt").write_bytes(bytes(self.log[-LOG_BYTES:]))


def _bounded(command: list[str], limit: float, environment) -> tuple[int | None, bytes]:
    """(exit code or None for a time-out, output). Ends the whole process group of a step that overstays."""
    with tempfile.TemporaryFile() as sink:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=3)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        sink.seek(0)
        return code, sink.read()


def find_gpu() -> tuple[str | None, str]:
    """(architecture for SARATHI_CUDA_ARCHS, or None; GPU name, or the reason why there is none)."""
    if shutil.which("nvidia-smi") is None:
        return None, "no NVIDIA GPU here: nvidia-smi is not on PATH"
    query = ["nvidia-smi", "--query-gpu=compute_cap,name", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
    if answer.returncode or not answer.stdout.strip():
        return None, f"no NVIDIA GPU here: nvidia-smi answers {(answer.stdout + answer.stderr).strip()[:120]!r}"
    capability, name = (part.strip() for part in answer.stdout.strip().splitlines()[0].split(",", 1))
    arch = capability.replace(".", "")
    return arch + ("a" if arch == "90" else ""), name


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit, on PATH or where it is installed by default."""
    default = Path("/usr/local/cuda/bin") / name
    return shutil.which(name) or (str(default) if default.exists() else None)


ENTRY = re.compile(r"Compiling entry function '(?P<symbol>[^']+)' for '(?P<arch>\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def kernel_resources(log: str) -> list[dict]:
    """What ptxas -v says of every kernel: symbol, arch, registers, stack, spill_stores, spill_loads, smem (bytes)."""
    kernels: list[dict] = []
    for line in log.splitlines():
        if m := ENTRY.search(line):
            kernels.append({"symbol": m["symbol"], "arch": m["arch"]})
        elif kernels and (m := STACK.search(line)):
            kernels[-1].update(stack=int(m[1]), spill_stores=int(m[2]), spill_loads=int(m[3]))
        elif kernels and (m := USED.search(line)):
            kernels[-1].update(registers=int(m[1]), smem=int(m[2] or 0))
    return kernels


def build_table(log: str) -> str:
    """The build's kernels as Markdown, those that spill first, names demangled where c++filt is there."""
    kernels = sorted(kernel_resources(log), key=lambda k: (-k.get("spill_stores", 0), k["symbol"]))
    names = {k["symbol"]: k["symbol"] for k in kernels}
    if kernels and shutil.which("c++filt"):
        answer = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, timeout=20)
        if answer.returncode == 0:
            names = dict(zip(names, answer.stdout.splitlines()))
    lines = ["# Kernels, as ptxas reports them", "", "| kernel | arch | registers | stack B | spill stores B | spill loads B | static smem B |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for k in kernels:
        name = names[k["symbol"]].replace("|", "/").split("(")[0][-110:]
        values = " | ".join(str(k.get(key, "")) for key in ("registers", "stack", "spill_stores", "spill_loads", "smem"))
        lines.append(f"| `{name}` | {k['arch']} | {values} |")
    return "\n".join(lines) + "\n"


def plan_steps(work: Path, arch: str | None, gpu: str) -> list[Step]:
    """The visit, most important first. `work` takes the raw results."""
    python = sys.executable
    on_gpu = (lambda: None if arch else gpu,)
    nvcc, checker = os.environ.get("CUDACXX") or find_tool("nvcc"), find_tool("compute-sanitizer")
    can_build = (*on_gpu, lambda: None if nvcc else "nvcc is neither on PATH nor in /usr/local/cuda/bin")
    built = (*on_gpu, lambda: None if list((ROOT / "sarathi_kernels").glob("_native*.so")) else "the native module was not built")
    sanitizer = (*built, lambda: None if checker else "compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin")
    bench, pytest = [python, "-m", "bench"], [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header"]
    # Compiling Triton's kernels for every case is what takes the time: eight processes where pytest-xdist is there.
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    quick = ["--device", "cuda", "--seconds", "0.08", "--dtype", "bfloat16"]
    build = [python, "-m", "bench.gpu_build", "--build", str(BUILD), "--nvcc", str(nvcc), "--archs", str(arch)]
    sanitize = [str(checker), "--error-exitcode", "9", "--tool"]
    small = [*pytest, "tests/test_gpu.py", "-k", "cuda and small"]
    cases = "A/*,B/*,C/*,D/*,published/llama8b,long/llama8b"
    return [
        Step("machine", 20, [python, "-c", MACHINE], optional=True),
        Step("build", 170, build, can_build),
        Step("tests", 110, [*pytest, "-v", *parallel, *sorted(str(p) for p in (ROOT / "tests").glob("test_*gpu.py"))], built),
        # The simulator against the hardware: attention by both, and the tests of instructions on the hardware.
        Step("simulator", 100, [*pytest, "tests/test_sim_hardware.py", "tests/test_sim_instructions.py", "tests/test_sim_sm90.py", "-k", "gpu or hardware"], can_build),
        Step("memcheck", 75, [*sanitize, "memcheck", *small], sanitizer),
        Step("micro", 40, [python, "-m", "bench.gpu_micro", "--json", str(work / "micro.json")], built),
        Step("attention", 110, [*bench, "attention", "--cases", cases, *quick, "--json", str(work / "attention.json")], built),
        Step("racecheck", 75, [*sanitize, "racecheck", *small], sanitizer),
        Step("append_kv", 20, [*bench, "append_kv", "--cases", "C/llama8b,B/llama8b", *quick, "--json", str(work / "append_kv.json")], built),
        Step("plan", 15, [*bench, "plan", "--device", "cuda", "--json", str(work / "plan.json")], built),
        Step("grid", 150, [*bench, "attention", "--cases", "hybrid/llama8b", "--shuffle", "--no-mixed", *quick, "--seconds", "0.03", "--json", str(work / "grid.json")], built),
    ]  # fmt: skip


MACHINE = """
import platform, shutil, subprocess, sys
print(sys.version.replace(chr(10), " "), platform.platform())
for command in (["nvidia-smi"], ["nvcc", "--version"], ["lscpu"]):
    if shutil.which(command[0]):
        print(subprocess.run(command, capture_output=True, text=True, timeout=15).stdout)
try:
    import torch, triton
    print("torch", torch.__version__, "cuda", torch.version.cuda, "triton", triton.__version__)
except ImportError as error:
    print(error)
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="out/gpu", help="folder for the results")
    parser.add_argument("--minutes", type=float, default=7.8, help="for everything")
    parser.add_argument("--steps", help='only these, for example "build,memcheck,grid"')
    args = parser.parse_args(arguments)
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        return visit(out, Path(folder), args.minutes, args.steps.split(",") if args.steps else None)


def visit(out: Path, work: Path, minutes: float, only: list[str] | None = None) -> int:
    """Runs every step (or `only` these), then collects. 1 if a step that ran failed; a dry run, where all are skipped, is 0.

    Raises:
        SystemExit: a step in `only` does not exist.
    """
    clock = Visit(out, work, minutes)
    arch, gpu = find_gpu()
    print(f"{gpu} (sm_{arch})" if arch else f"dry run: {gpu}")
    steps = plan_steps(work, arch, gpu)
    if unknown := sorted(set(only or ()) - {step.name for step in steps}):
        raise SystemExit(f"no such step: {', '.join(unknown)}; there are {', '.join(step.name for step in steps)}")
    failed, known = False, set()
    for step in steps:
        if only is not None and step.name not in only:
            continue
        ok = clock.run(step)
        failed |= not ok and clock.outcomes[-1].result != "skipped" and not step.optional
        if step.name == "build" and clock.outcomes[-1].result != "skipped":
            report = BUILD / "out" / "libsarathi_cuda.ptxas"
            (out / "build.md").write_text(build_table(report.read_text() if report.exists() else ""))
            if not ok:  # the Triton backend and the peers can still be measured
                clock.run(Step("build without CUDA", 90, [sys.executable, "-m", "bench.gpu_build", "--build", str(BUILD) + "-host"]))
        results = {str(path): path.stat().st_mtime for path in work.glob("*.json")}
        if set(results.items()) - known:  # rows are kept at once; the report and its pictures come last
            known |= set(results.items())
            limit = max(5, min(30, clock.left - REPORT_RESERVE_SECONDS))
            _bounded([sys.executable, "-m", "bench.gpu_collect", "--rows", str(out), *sorted(results)], limit, os.environ)
    results = sorted(map(str, work.glob("*.json")))
    have = (lambda: None if results else "no step left results",)
    clock.run(Step("report", 60, [sys.executable, "-m", "bench.gpu_collect", str(out), *results], have), reserve=0)
    clock.save()
    count = sum(1 for _ in out.iterdir())
    print((out / "status.md").read_text())
    print(f"{count} files in {out}" + ("" if count <= MAX_FILES else f": more than {MAX_FILES}, some of an earlier visit?"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
