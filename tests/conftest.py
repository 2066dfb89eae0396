"""Fixtures that several files share, and the tests marked `interpreter`: they run under TRITON_INTERPRET=1, in processes of their own.

The variable must be set before triton is imported, and the tests that compile need the real compiler. So each such test is
collected here as usual, run once in a child pytest together with all the others selected, and its outcome repeated here.
To debug one, run it directly: TRITON_INTERPRET=1 pytest tests/test_triton_interpreter.py -k NAME
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REPORT = "SARATHI_TEST_REPORT"
CHILDREN = 2
OUTCOMES = pytest.StashKey[dict]()


def pytest_configure(config):
    config.addinivalue_line("markers", "interpreter: runs under TRITON_INTERPRET=1, in a process of its own")


def pytest_runtest_logreport(report):
    """In a child: one line per phase that says something."""
    if os.environ.get(REPORT) and (report.when == "call" or not report.passed):
        with open(os.environ[REPORT], "a") as file:
            text = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else report.longreprtext
            print(json.dumps([report.nodeid, report.outcome, text]), file=file)


@pytest.fixture(scope="session")
def sim():
    """The simulator with the test kernels of tests/sim."""
    from sim import build

    return build.module("_sim_tests")


@pytest.fixture(scope="session")
def gpu_library_of(tmp_path_factory):
    """gpu_library_of(source, arch): test kernels of tests/sim compiled by nvcc, which needs no GPU; skips where there is no nvcc."""
    from sim import build

    def compiled(source, arch):
        if build.nvcc() is None:
            pytest.skip("there is no nvcc")
        return build.gpu_library(source, arch, tmp_path_factory.mktemp("gpu"))

    return compiled


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if pyfuncitem.get_closest_marker("interpreter") is None or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    session = pyfuncitem.session
    if OUTCOMES not in session.stash:
        session.stash[OUTCOMES] = run_children([i.nodeid for i in session.items if i.get_closest_marker("interpreter")])
    outcome, text = session.stash[OUTCOMES][pyfuncitem.nodeid]
    if outcome == "failed":
        pytest.fail(text, pytrace=False)
    if outcome == "skipped":
        pytest.skip(text)
    return True


def run_children(nodeids):
    """Runs the tests in child processes. Returns nodeid -> (outcome, text)."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for n in range(CHILDREN):
            mine, report, log = nodeids[n::CHILDREN], Path(folder, f"report{n}"), Path(folder, f"log{n}")
            if mine:
                Path(folder, f"tests{n}").write_text("\n".join(mine))
                command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"@{folder}/tests{n}"]
                environment = {**os.environ, "TRITON_INTERPRET": "1", REPORT: str(report), "OMP_NUM_THREADS": "1"}
                with log.open("w") as file:
                    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
                children.append((mine, report, log, process))
        outcomes = {}
        for mine, report, log, process in children:
            process.wait()
            missing = f"the interpreter's process said nothing of this test and ended with {process.returncode}:\n{log.read_text()[-4000:]}"
            outcomes.update((nodeid, ("failed", missing)) for nodeid in mine)
            lines = report.read_text().splitlines() if report.exists() else []
            outcomes.update((nodeid, (outcome, text)) for nodeid, outcome, text in map(json.loads, lines))
        return outcomes
