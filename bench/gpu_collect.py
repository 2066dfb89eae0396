"""What `make gpu` keeps: many raw results become one JSON file, one report and at most two plots."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from bench import report
from bench.rows import Report

KEPT_PLOTS = ("roofline", "heat_map")


def main(out: Path, files: list[Path], rows_only: bool = False) -> int:
    """Writes bench.json and micro.json, and unless rows_only, the report and its pictures."""
    micro = next((json.loads(path.read_text()) for path in files if path.stem == "micro"), None)
    reports = [Report.load(path) for path in files if path.stem != "micro"]
    if micro is not None:
        (out / "micro.json").write_text(json.dumps(micro, indent=1) + "\n")
    if not reports:
        print("no benchmark left rows")
        return 0
    total = reports[0]
    for other in reports[1:]:
        total.extend(other)
    total.save(out / "bench.json")
    if rows_only:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        written = report.write([out / "bench.json"], Path(folder))
        pictures = {kind: next((p for p in written if p.stem.startswith(kind)), None) for kind in KEPT_PLOTS}
        text = written[0].read_text().splitlines()
        kept = {p.name for p in pictures.values() if p}
        text = [line for line in text if not line.startswith("![") or any(name in line for name in kept)]
        for path in filter(None, pictures.values()):
            (out / path.name).write_bytes(path.read_bytes())
    (out / "report.md").write_text("\n".join(text) + "\n")
    print(f"{len(total.rows)} rows, {len(total.refused)} refused, absent: {', '.join(sorted(total.absent)) or 'nobody'}")
    return 0


if __name__ == "__main__":
    rows_only = sys.argv[1] == "--rows"
    out, *files = map(Path, sys.argv[1 + rows_only :])
    sys.exit(main(out, files, rows_only))
