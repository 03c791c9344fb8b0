"""Pooling over sizes: measures a sweep, and draws it for docs/pooling.md.

    python benchmarks/plots.py --json FILE                measures (3 minutes), draws
    python benchmarks/plots.py --json FILE --draw-only    draws what FILE holds

Max and average pooling of 2×2 windows with stride 2 and 3×3 windows with stride 2, float32 and
bfloat16, contiguous and channels-last, on inputs from 10 KB to 200 MB, by the measuring code of
`python -m weft bench`. Two figures: PyTorch's time over weft's, and weft's fraction of the copy
bandwidth of the run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from weft import facts
from weft.bench import report
from weft.bench.measure import Ceilings, Effort, measure
from weft.bench.rows import DIRECTIONS, PoolRow, Row

OPS = ("max_pool2d", "avg_pool2d")
WINDOWS = ((2, 2, 0), (3, 2, 1))  # size, stride, padding
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = ("NCHW", "NHWC")
SIZES = (
    (1, 16, 12, 12),
    (1, 32, 20, 20),
    (1, 64, 32, 32),
    (2, 64, 56, 56),
    (8, 64, 56, 56),
    (10, 64, 112, 112),
    (64, 64, 112, 112),
)
EFFORT = Effort(seconds=0.15, least=3, most=30)
DOCS = Path(__file__).parent.parent / "docs"
FIGURES = {
    "pooling_ratio.svg": ("ratio", "PyTorch's time / weft's time"),
    "pooling_bandwidth.svg": ("fraction_of_ceiling", "fraction of the copy bandwidth"),
}


def sweep(sizes: Sequence[tuple[int, ...]], effort: Effort) -> dict[str, Any]:
    """Measures every combination."""
    rows = [
        PoolRow(op, dtype, layout, False, size, *window)
        for op in OPS
        for window in WINDOWS
        for dtype in DTYPES
        for layout in LAYOUTS
        for size in sizes
    ]

    def input_bytes(row: PoolRow) -> dict[str, int]:
        return {"input_bytes": torch.Size(row.size).numel() * row.dtype.itemsize}

    return measure_rows(rows, effort, input_bytes)


def measure_rows(
    rows: Sequence[Row], effort: Effort, details: Callable[[Any], dict[str, Any]]
) -> dict[str, Any]:
    """The report as it stands in JSON; `details` of a row are added to what is measured."""
    device = torch.device("cpu")
    ceilings, measured = Ceilings(device), []
    with report.progress_bar() as progress:
        bar = progress.add_task("", total=len(rows) * len(DIRECTIONS))
        for row in rows:
            for direction in DIRECTIONS:
                progress.update(bar, description=f"{row} {direction}")
                found = measure(row, direction, device, ceilings, effort)
                measured.append({**found, **details(row)})
                progress.advance(bar)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": facts.machine(),
        "versions": facts.versions(),
        "threads": torch.get_num_threads(),
        "ceilings": ceilings.as_dict(),
        "rows": measured,
    }


def draw(found: dict[str, Any], folder: Path) -> None:
    """Writes both figures: a panel per op and direction, a line per window, dtype and layout."""
    import matplotlib
    from matplotlib.figure import Figure

    # The same file for the same numbers.
    matplotlib.rcParams.update({"svg.hashsalt": "weft", "svg.fonttype": "none"})
    colours = dict(
        zip(
            [(d, layout) for d in ("float32", "bfloat16") for layout in ("NCHW", "NHWC")],
            ("#1f4e79", "#7fa8d1", "#a8470f", "#e5a270"),
            strict=True,
        )
    )
    directions = {"f": "forward", "fb": "forward and backward"}
    folder.mkdir(parents=True, exist_ok=True)
    for name, (key, label) in FIGURES.items():
        figure = Figure(figsize=(10, 7), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True, sharey=True)
        for axes, op, direction in (
            (panels[i][j], op, direction)
            for i, op in enumerate(OPS)
            for j, direction in enumerate(directions)
        ):
            lines: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
            for row in found["rows"]:
                if (row["op"], row["direction"]) == (op, direction):
                    window = row["shape"].split(" ", 1)[1]
                    line = lines.setdefault((row["dtype"], row["layout"], window), [])
                    line.append((row["input_bytes"], row[key]))
            for (dtype, layout, window), points in lines.items():
                axes.plot(
                    *zip(*sorted(points), strict=True),
                    color=colours[dtype, layout],
                    linestyle="-" if window.startswith("k2") else "--",
                    marker="o",
                    markersize=3,
                    label=f"{dtype} {layout} {window}",
                )
            axes.set_title(f"{op}, {directions[direction]}", fontsize=10)
            axes.set_xscale("log")
            axes.axhline(1, color="black", linewidth=0.8)
            if key == "ratio":
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.3)
        for axes in panels[1]:
            axes.set_xlabel("bytes of the input")
        for axes in panels[:, 0]:
            axes.set_ylabel(label)
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
        figure.suptitle(
            f"{found['machine']['cpu']}, {found['threads']} threads, "
            f"torch {found['versions']['torch']}",
            fontsize=10,
        )
        figure.savefig(folder / name, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="pooling over sizes: measure and draw")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--draw-only", action="store_true", help="measure nothing")
    parser.add_argument("--folder", type=Path, default=DOCS, help="where the figures go")
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="only the N smallest")
    given = parser.parse_args(arguments)
    if not given.draw_only:
        report.write_json(sweep(SIZES[: given.sizes], EFFORT), given.json)
    draw(json.loads(given.json.read_text()), given.folder)


if __name__ == "__main__":
    main()
