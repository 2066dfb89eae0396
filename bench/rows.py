"""What a run leaves behind: rows, mixed-batch ratios, and who was absent or refused, as one JSON file with its machine record."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from bench.common import Timing, dtype_name
from bench.machine import machine_line
from bench.roofline import Ceilings, Work

ROW_KEYS = (
    "subject", "case", "backend", "dtype", "us", "us_min", "us_max", "tflops", "gbps", "roof_us", "roof_fraction", "ratio", "max_err",
)  # fmt: skip


def make_row(
    subject: str, case: str, backend: str, dtype: torch.dtype, timing: Timing, work: Work, ceilings: Ceilings, max_err: float | None
) -> dict:
    """One row. `ratio` is filled by `add_ratios`, once every competitor has been timed.

    Units: us microseconds; tflops 1e12 operations/s; gbps 1e9 bytes/s, of the work that cannot be avoided; roof_us the roofline
    floor; roof_fraction roof_us / us; max_err the largest absolute error on the rows that were checked.
    """
    roof = work.floor_us(ceilings, dtype)
    return {
        "subject": subject,
        "case": case,
        "backend": backend,
        "dtype": dtype_name(dtype),
        "us": round(timing.us, 3),
        "us_min": round(timing.us_min, 3),
        "us_max": round(timing.us_max, 3),
        "tflops": _significant(work.flops / timing.us / 1e6),
        "gbps": _significant(work.bytes / timing.us / 1e3),
        "roof_us": round(roof, 3),
        "roof_fraction": round(roof / timing.us, 4),
        "ratio": {},
        "max_err": None if max_err is None else _significant(max_err),
    }


def add_ratios(rows: list[dict], peers: set[str]) -> None:
    """For rows of one case, dtype and run: ratio[peer] = the peer's time over the row's; above 1 the row is faster."""
    times = {row["backend"]: row["us"] for row in rows}
    for row in rows:
        row["ratio"] = {peer: round(times[peer] / row["us"], 4) for peer in sorted(peers & times.keys()) if peer != row["backend"]}


def _significant(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


@dataclasses.dataclass
class Report:
    """One run.

    Attributes:
        machine: from machine_record, with the measured ceilings under "ceilings".
        rows: see make_row.
        mixed: one per mixed case and backend: prefill_us, decode_us, mixed_us, over_max = mixed / max(parts), over_sum = mixed / sum.
        absent: competitor -> why it could not be tried at all.
        refused: competitors that were tried and gave no number: case, backend, dtype, why.
        engine: results of `bench engine`, in the field names of `vllm bench serve`.
    """

    machine: dict
    rows: list[dict] = dataclasses.field(default_factory=list)
    mixed: list[dict] = dataclasses.field(default_factory=list)
    absent: dict[str, str] = dataclasses.field(default_factory=dict)
    refused: list[dict] = dataclasses.field(default_factory=list)
    engine: list[dict] = dataclasses.field(default_factory=list)

    def save(self, path: str | Path) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        data = json.loads(Path(path).read_text())
        fields = {f.name for f in dataclasses.fields(cls)}
        if "machine" not in data or not data.keys() <= fields:
            raise ValueError(f"{path} is not a benchmark result: it has the keys {sorted(data)}, want machine and some of {sorted(fields)}")
        return cls(**data)

    def extend(self, other: Report) -> None:
        """Takes over another report's results. The machine record stays, with the better of the ceilings."""
        mine, theirs = (r.machine.get("ceilings") for r in (self, other))
        if isinstance(theirs, dict):
            self.machine["ceilings"] = Ceilings(**mine).joined(Ceilings(**theirs))._asdict() if mine else theirs
        self.rows += other.rows
        self.mixed += other.mixed
        self.absent |= other.absent
        self.refused += other.refused
        self.engine += other.engine

    def print(self) -> None:
        print(machine_line(self.machine))
        if self.rows:
            print(f"{'case':<28}{'backend':<22}{'dtype':<10}{'us':>12}{'[min-max]':>24}{'TFLOP/s':>9}{'GB/s':>8}{'roof':>7}  ratio")
        for row in self.rows:
            spread = f"[{row['us_min']:.1f}-{row['us_max']:.1f}]"
            ratio = " ".join(f"{peer} {value:.2f}x" for peer, value in row["ratio"].items())
            print(
                f"{row['case']:<28}{row['backend']:<22}{row['dtype']:<10}{row['us']:>12.1f}{spread:>24}"
                f"{row['tflops']:>9.3g}{row['gbps']:>8.3g}{row['roof_fraction']:>7.1%}  {ratio}"
            )
        for m in self.mixed:
            print(f"{m['case']:<28}{m['backend']:<22}{m['dtype']:<10} mixed / max(parts) {m['over_max']:.3f}, mixed / sum(parts) {m['over_sum']:.3f}")
        for name, why in self.absent.items():
            print(f"absent: {name}: {why}")
        for r in self.refused:
            print(f"no number: {r['case']} {r['backend']} {r['dtype']}: {r['why']}")
