"""The pictures of a report. Each draws what its rows allow and is left out where there are none."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np

from bench.cases import NAMED
from bench.rows import Report
from sarathi_kernels import backends

# Ours in strong colours, the same in every picture; peers in muted ones, in order of appearance.
OURS = {"cuda": "#0b6e4f", "triton": "#1d6fb8", "cpu": "#c1121f", "reference": "#777777"}
PEERS = ("#e9a03b", "#8e6bb0", "#4aa3a2", "#a97155", "#d07b9e", "#7f9f5f", "#5c7aa8", "#b0a04a", "#999999", "#c58f5c")
ENGINES = ("#c1121f", "#1d6fb8", "#e9a03b", "#4aa3a2", "#8e6bb0", "#7f9f5f", "#a97155")
MARKERS = "osD^vP*Xhd<>"


def draw_all(reports: list[Report], out: Path) -> list[Path]:
    """Every picture that the results allow, as PNG files in `out`."""
    written = []
    for dtype in dict.fromkeys(row["dtype"] for report in reports for row in report.rows if row["subject"] == "attention"):
        written.append(roofline(reports, dtype, out / f"roofline_{dtype}.png"))
        for model in _hybrid_models(reports, dtype):
            written.append(heat_map(reports, dtype, model, out / f"heat_map_{model}_{dtype}.png"))
    entries = [entry for report in reports for entry in report.engine if "itls" in entry]
    for i, workload in enumerate(dict.fromkeys(entry["workload"] for entry in entries)):
        chosen = [entry for entry in entries if entry["workload"] == workload]
        suffix = f"_{i}" if i else ""
        written.append(tbt_cdf(chosen, workload, out / f"tbt_cdf{suffix}.png"))
        written.append(timeline(chosen, workload, out / f"timeline{suffix}.png"))
    return [path for path in written if path is not None]


def engine_label(entry: dict) -> str:
    """An engine and the options that tell it from its neighbours."""
    options = entry.get("options") or {}
    extras = [str(options[key]) for key in ("dtype", "precision") if options.get(key) not in (None, "auto")]
    if options.get("linear", "dense") != "dense":
        extras.append(f"{options['linear']} linears")
    if options.get("token_budget"):
        extras.append(f"budget {options['token_budget']}")
    return entry["backend"] + (f" ({', '.join(extras)})" if extras else "")


def _colours(names: list[str]) -> dict[str, str]:
    peers = [n for n in names if n not in OURS]
    return {n: OURS.get(n) or PEERS[peers.index(n) % len(PEERS)] for n in names}


def roofline(reports: list[Report], dtype: str, path: Path) -> Path | None:
    """Achieved rate over arithmetic intensity, under the best ceilings that the runs with these rows measured."""
    rows = [r for report in reports for r in report.rows if r["subject"] == "attention" and r["dtype"] == dtype and r["backend"] != "reference"]
    ceilings = [r.machine["ceilings"] for r in reports if any(row["subject"] == "attention" for row in r.rows) and "ceilings" in r.machine]
    ceilings = [c for c in ceilings if dtype in c["matmul_tflops"]]
    if not rows or not ceilings:
        return None
    peak, bandwidth = 1e3 * max(c["matmul_tflops"][dtype] for c in ceilings), max(c["read_gbps"] for c in ceilings)
    figure, axes = plt.subplots(figsize=(9, 5.6))
    names = sorted(dict.fromkeys(r["backend"] for r in rows), key=lambda n: n not in backends.NAMES)
    colours = _colours(names)
    intensity = lambda row: row["tflops"] * 1e3 / row["gbps"]
    for i, name in enumerate(names):
        mine = [r for r in rows if r["backend"] == name]
        ours = name in backends.NAMES
        axes.scatter(
            [intensity(r) for r in mine], [r["tflops"] * 1e3 for r in mine], label=name, color=colours[name], marker=MARKERS[i % len(MARKERS)],
            s=80 if ours else 38, zorder=4 if ours else 3, edgecolor="black" if ours else "none", linewidth=0.6,
        )  # fmt: skip
    low, high = min(map(intensity, rows)) / 4, max(map(intensity, rows)) * 2.5
    x = np.geomspace(low, high, 200)
    axes.plot(x, np.minimum(peak, x * bandwidth), color="black", linewidth=1.2, zorder=2)
    unit = ("TFLOP/s", 1e-3) if peak > 5000 else ("GFLOP/s", 1.0)
    axes.annotate(f"matmul {peak * unit[1]:.4g} {unit[0]}", (high, peak), xytext=(-4, 5), textcoords="offset points", ha="right", fontsize=9)
    slope = np.sqrt(low * peak / bandwidth)
    axes.annotate(f"read {bandwidth:.4g} GB/s", (slope, slope * bandwidth), xytext=(-6, 4), textcoords="offset points", ha="right", fontsize=9)
    bottom = min(r["tflops"] for r in rows) * 1e3 / 6
    by_case = {r["case"]: intensity(r) for r in rows}
    if len(by_case) > 12:
        by_case = {case: x0 for case, x0 in by_case.items() if case.split("/")[0] in NAMED}
    above = -np.inf
    for case, x0 in sorted(by_case.items(), key=lambda item: item[1]):
        axes.axvline(x0, color="#bbbbbb", linewidth=0.6, linestyle=":", zorder=1)
        above = max(np.log10(x0), above + 0.02 * np.log10(high / low))  # names of cases of nearly the same intensity, side by side
        axes.text(10**above, bottom * 1.15, case, rotation=90, ha="center", va="bottom", fontsize=7.5, color="#444444")
    axes.set(xscale="log", yscale="log", xlabel="arithmetic intensity, FLOP per byte that must be read or written", ylabel="achieved GFLOP/s")
    axes.set_ylim(bottom=bottom, top=2 * peak)
    axes.set_title(f"Attention against the measured roofline, {dtype}")
    axes.grid(True, which="both", alpha=0.15)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, frameon=False)
    return _save(figure, path)


CELL = re.compile(r"(?P<prefill>c\d+@\d+)\+(?P<decode>\d+@\d+)/(?P<model>\w+)$")


def _hybrid_models(reports: list[Report], dtype: str) -> list[str]:
    found = [CELL.match(r["case"]) for report in reports for r in report.rows if r["dtype"] == dtype and r["subject"] == "attention"]
    counts: dict[str, set] = {}
    for m in found:
        if m:
            counts.setdefault(m["model"], set()).add(m[0])
    return [model for model, cells in counts.items() if len(cells) >= 4]


def heat_map(reports: list[Report], dtype: str, model: str, path: Path) -> Path | None:
    """Speed-up of our fastest backend over the fastest peer, per chunk (rows) and decodes (columns) of the hybrid grid."""
    best: dict[tuple[str, str], dict[str, float]] = {}
    for row in (r for report in reports for r in report.rows if r["dtype"] == dtype and r["subject"] == "attention"):
        m = CELL.match(row["case"])
        if not m or m["model"] != model or row["backend"] == "reference":
            continue
        side = "ours" if row["backend"] in backends.NAMES else "peer"
        cell = best.setdefault((m["prefill"], m["decode"]), {})
        if row["us"] < cell.get(side, np.inf):
            cell[side], cell[side + " name"] = row["us"], row["backend"]
    cells = {key: cell for key, cell in best.items() if "ours" in cell and "peer" in cell}
    if not cells:
        return None
    numeric = lambda text: tuple(int(n) for n in re.findall(r"\d+", text))
    prefills = sorted({p for p, _ in cells}, key=numeric)
    decodes = sorted({d for _, d in cells}, key=numeric)
    ratio = np.full((len(prefills), len(decodes)), np.nan)
    for (p, d), cell in cells.items():
        ratio[prefills.index(p), decodes.index(d)] = cell["peer"] / cell["ours"]
    # A long peer's name takes two lines: the library and which of its kernels.
    label = lambda name: name.replace("_", "\n", 1) if len(name) > 14 else name
    widest = max(len(line) for cell in cells.values() for line in label(cell["peer name"]).split("\n"))
    lines = max(label(cell["peer name"]).count("\n") for cell in cells.values())
    figure, axes = plt.subplots(figsize=(3.0 + max(1.0, 0.085 * widest) * len(decodes), 2.0 + (0.45 + 0.15 * lines) * len(prefills)))
    limit = max(2.0, float(np.nanmax(ratio)), float(np.nanmax(1 / ratio)))
    image = axes.imshow(np.log2(ratio), cmap="RdBu", vmin=-np.log2(limit), vmax=np.log2(limit), aspect="auto")
    for (p, d), cell in cells.items():
        i, j = prefills.index(p), decodes.index(d)
        dark = abs(np.log2(ratio[i, j])) > 0.6 * np.log2(limit)
        axes.text(j, i, f"{ratio[i, j]:.2f}x\n{label(cell['peer name'])}", ha="center", va="center", fontsize=7.5, color="white" if dark else "black")
    word = lambda d: "{} x {:,}".format(*numeric(d))
    axes.set_xticks(range(len(decodes)), [word(d) for d in decodes], fontsize=8)
    axes.set_yticks(range(len(prefills)), ["{:,} behind {:,}".format(*numeric(p)) for p in prefills], fontsize=8)
    axes.set(xlabel="decodes x keys each", ylabel="chunk tokens behind prior tokens")
    ours = sorted({cell["ours name"] for cell in cells.values()})
    axes.set_title(f"{model}, {dtype}: {'/'.join(ours)} against the best peer\n(above 1x, blue: ours is faster)", fontsize=10)
    bar = figure.colorbar(image, ax=axes)
    ticks = [t for t in (0.125, 0.25, 0.5, 1, 2, 4, 8) if 1 / limit <= t <= limit]
    bar.set_ticks([np.log2(t) for t in ticks], labels=[f"{t:g}x" for t in ticks])
    return _save(figure, path)


def tbt_cdf(entries: list[dict], workload: str, path: Path) -> Path | None:
    """Share of the gaps between tokens that are at most so long, per engine and policy, all repeats together."""
    gaps: dict[str, list[float]] = {}
    for entry in entries:
        gaps.setdefault(engine_label(entry), []).extend(1e3 * gap for itl in entry["itls"] for gap in itl)
    gaps = {label: values for label, values in gaps.items() if values}
    if not gaps:
        return None
    figure, axes = plt.subplots(figsize=(8, 4.6))
    for colour, (label, values) in zip(ENGINES, gaps.items()):
        x = np.sort(values)
        y = np.arange(1, len(x) + 1) / len(x)
        p99 = float(np.percentile(x, 99))
        axes.step(x, y, where="post", color=colour, label=f"{label}: p99 {p99:,.0f} ms")
        axes.plot([p99], [0.99], marker="o", color=colour, markersize=5)
    axes.axhline(0.99, color="#999999", linewidth=0.8, linestyle=":")
    # The tail is what stalls are about: the axis is stretched towards 1.
    axes.set_yscale("function", functions=(lambda y: -np.log10(1.001 - np.clip(y, 0, 1)), lambda t: 1.001 - 10.0 ** -np.asarray(t)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_yticks([0, 0.5, 0.9, 0.99, 1.0], ["0", "50 %", "90 %", "99 %", "100 %"])
    axes.set(xscale="log", xlabel="time between tokens, ms", ylabel="share of gaps at most so long", ylim=(0, 1))
    axes.set_title(f"Time between tokens: {workload}", fontsize=10)
    axes.grid(True, alpha=0.2, which="both")
    axes.legend(fontsize=8.5, loc="lower right")
    return _save(figure, path)


def timeline(entries: list[dict], workload: str, path: Path) -> Path | None:
    """Each request's wait for its first token and its tokens after that, one panel per engine and policy (first repeat)."""
    first: dict[str, dict] = {}
    for entry in entries:
        first.setdefault(engine_label(entry), entry)
    panels = [(label, entry) for label, entry in first.items() if entry["num_prompts"] <= 64]
    if not panels:
        return None
    end = max(entry["duration"] for _, entry in panels)
    height = sum(0.9 + 0.16 * entry["num_prompts"] for _, entry in panels)
    ratios = [entry["num_prompts"] + 4 for _, entry in panels]
    figure, all_axes = plt.subplots(len(panels), 1, figsize=(9.5, height + 0.6), sharex=True, squeeze=False, height_ratios=ratios)
    for (label, entry), axes in zip(panels, all_axes[:, 0]):
        for i, (start, ttft, itl) in enumerate(zip(entry["start_times"], entry["ttfts"], entry["itls"])):
            if ttft is None:
                axes.plot([start], [i], marker="x", color="black")
                continue
            times = start + ttft + np.concatenate(([0.0], np.cumsum(itl)))
            axes.barh(i, ttft, left=start, height=0.62, color="#e9c88f")
            axes.vlines(times, i - 0.31, i + 0.31, color="#1d6fb8", linewidth=0.7)
        axes.set_ylim(entry["num_prompts"] - 0.4, -0.6)
        axes.set_xlim(0, end * 1.01)
        axes.set_title(f"{label}: {entry['output_throughput']:.0f} output tok/s, TBT p99 {entry['p99_itl_ms']:,.0f} ms", fontsize=9.5, loc="left")
        axes.set_ylabel("request", fontsize=9)
        axes.grid(True, axis="x", alpha=0.2)
    all_axes[-1, 0].set_xlabel("seconds; sand: waiting for the first token, blue: one line per token")
    figure.suptitle(workload, fontsize=10)
    return _save(figure, path)


def _save(figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path
