"""`bench report`: Markdown tables and plots from committed results. Every figure in it is a row of the JSON beside it."""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from pathlib import Path

from bench import plots
from bench.machine import machine_line
from bench.rows import Report
from sarathi_kernels import backends

RESULTS = Path(__file__).parent / "results"
ENGINE_COLUMNS = (
    ("output_throughput", "out tok/s", 1.0, 1), ("total_token_throughput", "all tok/s", 1.0, 0), ("median_ttft_ms", "TTFT p50 s", 1e-3, 2),
    ("p99_ttft_ms", "TTFT p99 s", 1e-3, 2), ("median_itl_ms", "TBT p50 ms", 1.0, 1), ("p99_itl_ms", "TBT p99 ms", 1.0, 0),
    ("median_e2el_ms", "E2E p50 s", 1e-3, 2), ("request_goodput", "good req/s", 1.0, 3),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", help="result files; default: every folder of bench/results, each into its own report")
    parser.add_argument("--out", help="folder for report.md and the plots; default: where the files lie")


def main(args: argparse.Namespace) -> int:
    if args.files:
        files = [Path(name) for name in args.files]
        write(files, Path(args.out) if args.out else files[0].parent)
        return 0
    folders = sorted({path.parent for path in RESULTS.rglob("*.json")})
    if not folders:
        raise SystemExit(f"no results under {RESULTS}: name some files")
    for folder in folders:
        write(sorted(folder.glob("*.json")), Path(args.out) / folder.name if args.out else folder)
        print(folder)
    return 0


def write(files: list[Path], out: Path) -> list[Path]:
    """report.md and the plots that the results allow; returns what was written."""
    reports = sorted(((path, Report.load(path)) for path in files), key=lambda item: _order(item[1]))
    out.mkdir(parents=True, exist_ok=True)
    pictures = plots.draw_all([report for _, report in reports], out)
    text = ["# Results", "", "Written by `python -m bench report` from the JSON files in this folder. Times: median [min-max].", ""]
    for path, report in reports:
        text += [f"## {path.stem}", "", machine_line(report.machine), ""]
        text += _ceilings(report) + tables(report)
    text += [f"![{path.stem.replace('_', ' ')}]({path.name})" for path in pictures]
    (out / "report.md").write_text("\n".join(text).rstrip() + "\n")
    return [out / "report.md", *pictures]


def _order(report: Report) -> int:
    """What people come for first: the attention op, then the engine, then the rest."""
    subjects = {row["subject"] for row in report.rows}
    return 0 if "attention" in subjects else 1 if report.engine else 2


def tables(report: Report) -> list[str]:
    """All tables of one run as Markdown lines."""
    lines = []
    grouped = defaultdict(list)
    for row in report.rows:
        _, slash, model = row["case"].removesuffix("+rope").rpartition("/")
        grouped[row["subject"], row["dtype"], model if slash else ""].append(row)
    for (subject, dtype, model), rows in grouped.items():
        lines += [f"### {subject}, {dtype}" + (f", {model} heads" if model else ""), ""] + _times(rows) + [""]
    if report.mixed:
        lines += ["### A mixed batch in one launch, against its parts alone", ""] + _mixed(report.mixed) + [""]
    for workload in dict.fromkeys(entry["workload"] for entry in report.engine):
        entries = [e for e in report.engine if e["workload"] == workload]
        lines += [f"### Engine: {workload}", ""] + _engine(entries) + [""]
        slo = entries[0].get("goodput_slo_ms")
        if slo:
            lines += ["Good requests meet " + ", ".join(f"{name} at most {ms:g} ms" for name, ms in slo.items()) + ".", ""]
    if report.absent or report.refused:
        lines += ["No number:", ""]
        lines += [f"- {name}: {why}" for name, why in sorted(report.absent.items())]
        lines += [f"- {r['case']}, {r['backend']}, {r['dtype']}: {r['why']}" for r in report.refused] + [""]
    return lines


def _ceilings(report: Report) -> list[str]:
    ceilings = report.machine.get("ceilings")
    if not ceilings:
        return []
    rates = ", ".join(f"{1e3 * tflops:.4g} GFLOP/s {name}" for name, tflops in ceilings["matmul_tflops"].items())
    return [f"Measured ceilings: matmul {rates}; read {ceilings['read_gbps']:.4g} GB/s.", ""]


def milliseconds(us: float) -> str:
    """At least three significant digits, in ms."""
    ms = us / 1e3
    return f"{ms:.4f}" if ms < 0.1 else f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 1000 else f"{ms:.0f}"


def microseconds(us: float) -> str:
    return f"{us:.1f}" if us < 100 else f"{us:.0f}"


def _times(rows: list[dict]) -> list[str]:
    """Competitors by cases (cases by competitors where there are many). Ours first, then peers from fast to slow; the fastest bold."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    found = {(row["backend"], row["case"]): row for row in rows}
    names = sorted({row["backend"] for row in rows}, key=lambda n: (n not in backends.NAMES, _typical(n, cases, found)))
    small = max(row["us"] for row in rows) < 1000
    unit, show = ("us", microseconds) if small else ("ms", milliseconds)
    lines: list[list[str]] = [[unit, *cases]]
    for name in names:
        lines.append([name, *(_cell(found.get((name, case)), [found[n, case] for n in names if (n, case) in found], show) for case in cases)])
    with_roof = all(row["roof_us"] for row in rows)
    if with_roof:
        lines.append(["*roofline floor*", *(show(next(row["roof_us"] for row in rows if row["case"] == case)) for case in cases)])
    for ours in [n for n in names if n in backends.NAMES and n != "reference"]:
        mine = [found.get((ours, case)) for case in cases]
        if with_roof:
            lines.append([f"*{ours}: share of the floor*", *(f"{row['roof_fraction']:.0%}" if row else "" for row in mine)])
        if any(row and row["ratio"] for row in mine):
            lines.append([f"*{ours}: against the best peer*", *(_best_peer(row) for row in mine)])
    if len(cases) > 6:
        lines = [list(column) for column in zip(*lines)]
    head, *body = lines
    return ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1), *("| " + " | ".join(line) + " |" for line in body)]


def _cell(row: dict | None, same_case: list[dict], show) -> str:
    if row is None:
        return ""
    time = show(row["us"])
    time = f"**{time}**" if row["us"] == min(other["us"] for other in same_case) and len(same_case) > 1 else time
    return f"{time} [{show(row['us_min'])}-{show(row['us_max'])}]"


def _best_peer(row: dict | None) -> str:
    if not row or not row["ratio"]:
        return ""
    peer, ratio = min(row["ratio"].items(), key=lambda item: item[1])
    return f"{ratio:.2f}x {peer}"


def _typical(name: str, cases: list[str], found: dict) -> float:
    """Mean of a competitor's time over the case's best: for ordering."""
    values = [found[name, c]["us"] / min(row["us"] for (_, k), row in found.items() if k == c) for c in cases if (name, c) in found]
    return sum(values) / len(values)


def _mixed(entries: list[dict]) -> list[str]:
    lines = ["| case | backend | dtype | mixed ms | prefill alone | decodes alone | mixed / longer part | mixed / sum |", "| --- " * 3 + "| ---: " * 5 + "|"]
    for m in entries:
        times = " | ".join(milliseconds(m[key]) for key in ("mixed_us", "prefill_us", "decode_us"))
        lines.append(f"| {m['case']} | {m['backend']} | {m['dtype']} | {times} | {m['over_max']:.3f} | {m['over_sum']:.3f} |")
    return lines


def _engine(entries: list[dict]) -> list[str]:
    """One line per engine and options: median over repeats, and the spread of the throughput."""
    shown = [column for column in ENGINE_COLUMNS if any(entry.get(column[0]) is not None for entry in entries)]
    lines = ["| engine | " + " | ".join(title for _, title, _, _ in shown) + " |", "| --- |" + " ---: |" * len(shown)]
    runs = defaultdict(list)
    for entry in entries:
        runs[plots.engine_label(entry)].append(entry)
    for label, repeats in runs.items():
        cells = []
        for key, _, factor, digits in shown:
            values = [entry[key] * factor for entry in repeats if entry.get(key) is not None]
            if not values:
                cells.append("")
                continue
            cell = f"{statistics.median(values):.{digits}f}"
            if len(values) > 1 and key in ("output_throughput", "p99_itl_ms"):
                cell += f" [{min(values):.{digits}f}-{max(values):.{digits}f}]"
            cells.append(cell)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines
