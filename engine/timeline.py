"""Draws who got a token when: one panel per run, one line per request, one mark per token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)

from engine.metrics import Trace  # noqa: E402

CHAT, LONG, STALL, WAIT = "#1f5fa8", "#c2571a", "#d62728", "#dddddd"


def draw(runs: Sequence[tuple[str, Sequence[Trace], tuple[float, float]]], num_chats: int, path: Path) -> None:
    """Writes the picture.

    Args:
        runs: (title, traces in order of arrival, (length, begin) of the longest stall) of each run.
        num_chats: how many leading traces are chats; the others are long prompts.
        path: where to write the PNG.
    """
    figure, axes = plt.subplots(len(runs), 1, sharex=True, figsize=(11, 3.0 * len(runs) + 0.8), squeeze=False)
    end = max(t.times[-1] for _, traces, _ in runs for t in traces)
    for axis, (title, traces, (length, begin)) in zip(axes[:, 0], runs, strict=True):
        rows = range(len(traces) - 1, -1, -1)
        axis.axvspan(begin, begin + length, color=STALL, alpha=0.13, linewidth=0)
        for row, trace in zip(rows, traces, strict=True):
            color = CHAT if trace in traces[:num_chats] else LONG
            axis.hlines(row, trace.arrival, trace.times[0], color=WAIT, linewidth=7)
            axis.plot(trace.times, [row] * len(trace.times), "|", color=color, markersize=11, markeredgewidth=1.1)
            axis.plot(trace.arrival, row, ">", color=color, markersize=5)
        arrival = traces[-1].arrival
        axis.axvline(arrival, color=LONG, linewidth=0.9, linestyle=":")
        axis.set_yticks(list(rows), [f"chat {i + 1}" if i < num_chats else f"long {i - num_chats + 1}" for i in range(len(traces))])
        axis.set_ylim(-0.7, len(traces) - 0.3)
        axis.set_title(f"{title}: longest stall {length:.2f} s", loc="left", fontsize=11, fontweight="bold", pad=16)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0, 0].annotate(
        "long prompts arrive", (runs[0][1][-1].arrival, 1), xycoords=("data", "axes fraction"),
        xytext=(0, 3), textcoords="offset points", ha="left", color=LONG, fontsize=9,
    )  # fmt: skip
    axes[-1, 0].set_xlim(-0.01 * end, 1.01 * end)
    axes[-1, 0].set_xlabel("seconds since the chats arrived   (mark: a token; grey: waiting for the first; red: nobody gets a token)")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
