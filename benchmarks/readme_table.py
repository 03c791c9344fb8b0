"""Writes a measured run into README.md, between its two `results` marks.

    python benchmarks/readme_table.py benchmarks/results/RUN.json

`tests/test_readme.py` checks that README.md holds what the named run holds.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from weft.bench.report import seconds

ROOT = Path(__file__).parent.parent
MARKS = re.compile(r"(<!-- results.*? -->\n).*?(<!-- /results -->)", re.DOTALL)


def _title(row: dict[str, Any]) -> tuple[str, ...]:
    return row["op"], row["shape"], row["dtype"], row["layout"]


def _table(rows: list[dict[str, Any]], baseline: str) -> list[str]:
    lines = [
        "| op | shape | dtype | layout | weft f | ratio f | weft fb | ratio fb |",
        "|---|---|---|---|---|---|---|---|",
    ]
    pairs: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["baseline"] == baseline:
            pairs.setdefault(_title(row), {})[row["direction"]] = row
    for title, pair in pairs.items():
        cells = list(title)
        for direction in ("f", "fb"):
            row = pair[direction]
            cells += [seconds(row["weft_s"]), f"{row['ratio']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def section(run: dict[str, Any], name: str) -> str:
    """The table of `run`, the JSON of `python -m weft bench --full`, kept as file `name`."""
    machine, versions, ceilings = run["machine"], run["versions"], run["ceilings"]
    lines = [
        f"{machine['cpu']}, {run['threads']} threads, {machine['instruction_set']}; torch "
        f"{versions['torch']}, Python {versions['python']}, GCC {versions['compiler']}; "
        f"{run['date'][:10]}, commit {versions['commit'][:10]}. Ceilings of the run: copy "
        f"{ceilings['copy_bytes_per_s'] / 1e9:.0f} GB/s, float32 product "
        f"{ceilings['matmul_flops_per_s']['float32'] / 1e9:.0f} GFLOP/s, multiply-adds in "
        f"registers {ceilings['cpu_multiply_add_flops_per_s'] / 1e9:.0f}. With spreads and memory: "
        f"[{name}]({name}).",
        "",
        "Ratio = baseline's time / weft's, both in turn in a process of the row's own, medians; f",
        "is forward, fb forward and backward.",
    ]
    for baseline in dict.fromkeys(row["baseline"] for row in run["rows"]):
        lines += ["", f"Baseline: {baseline}.", "", *_table(run["rows"], baseline)]
    twice = [row for row in run["rows"] if row["direction"] == "fbb"]
    if twice:
        each = (f"{row['op']} {row['shape']} {row['dtype']} {row['ratio']:.2f}" for row in twice)
        lines += ["", "Ratio with double backward: " + ", ".join(each) + "."]
    lines += [
        "",
        "| family | geometric mean f | fb | rows below 1.0: f | fb |",
        "|---|---|---|---|---|",
    ]
    for family, baseline in dict.fromkeys((row["family"], row["baseline"]) for row in run["rows"]):
        rows = [r for r in run["rows"] if (r["family"], r["baseline"]) == (family, baseline)]
        ratios = {d: [r["ratio"] for r in rows if r["direction"] == d] for d in ("f", "fb")}
        means = [math.exp(sum(map(math.log, r)) / len(r)) for r in ratios.values()]
        below = [f"{sum(x < 1 for x in r)} of {len(r)}" for r in ratios.values()]
        title = family if baseline == "PyTorch" else f"{family}, against {baseline}"
        lines.append(f"| {title} | {means[0]:.2f} | {means[1]:.2f} | {below[0]} | {below[1]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    name = sys.argv[1]
    run = json.loads((ROOT / name).read_text())
    readme = ROOT / "README.md"
    text = readme.read_text()
    body = section(run, name)
    readme.write_text(MARKS.sub(lambda m: f"<!-- results: {name} -->\n{body}{m[2]}", text))


if __name__ == "__main__":
    main()
