"""Sweeps over sizes for the pages of docs/: what the plots of all families share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from weft import facts
from weft.bench import report
from weft.bench.measure import Ceilings, Effort, measure
from weft.bench.rows import DIRECTIONS, Row

# The same file for the same numbers.
matplotlib.rcParams.update({"svg.hashsalt": "weft", "svg.fonttype": "none"})

DOCS = Path(__file__).parent.parent / "docs"
# The first calls on hundreds of MB wait for pages that the machine has yet to give.
EFFORT = Effort(seconds=0.15, least=9, most=30)
TITLES = {"f": "forward", "fb": "forward and backward"}
RATIO = "PyTorch's time / weft's time"
COLOURS = {
    ("float32", "NCHW"): "#1f4e79",
    ("float32", "NHWC"): "#7fa8d1",
    ("bfloat16", "NCHW"): "#a8470f",
    ("bfloat16", "NHWC"): "#e5a270",
}
Report = dict[str, Any]
Size = TypeVar("Size")


def measure_rows(rows: Sequence[tuple[Row, dict[str, Any]]], effort: Effort) -> Report:
    """The report as it stands in JSON; what goes with a row is added to what is measured."""
    device = torch.device("cpu")
    ceilings, measured = Ceilings(device), []
    with report.progress_bar() as progress:
        bar = progress.add_task("", total=len(rows) * len(DIRECTIONS))
        for row, details in rows:
            for direction in DIRECTIONS:
                progress.update(bar, description=f"{row} {direction}")
                measured.append({**measure(row, direction, device, ceilings, effort), **details})
                progress.advance(bar)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": facts.machine(),
        "versions": facts.versions(),
        "threads": torch.get_num_threads(),
        "ceilings": ceilings.as_dict(),
        "rows": measured,
    }


def plot(axes: Axes, points: Sequence[tuple[int, float]], **style: Any) -> None:
    axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, **style)


def finish(axes: Axes, title: str, ratio: bool, base: int = 10) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xscale("log", base=base)
    axes.axhline(1, color="black", linewidth=0.8)
    if ratio:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)


def save(figure: Figure, panels: Any, found: Report, x: str, y: str, path: Path) -> None:
    """Labels the outer panels, adds the legend and what was measured on, and writes the file."""
    for axes in panels[-1]:
        axes.set_xlabel(x)
    for axes in panels[:, 0]:
        axes.set_ylabel(y)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(
        f"{found['machine']['cpu']}, {found['threads']} threads, "
        f"torch {found['versions']['torch']}",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def run(
    description: str,
    sizes: Sequence[Size],
    sweep: Callable[[Sequence[Size]], Report],
    draw: Callable[[Report, Path], None],
    arguments: Sequence[str] | None,
) -> None:
    """A script's command line: measures, and draws from the file."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--draw-only", action="store_true", help="measure nothing")
    parser.add_argument("--folder", type=Path, default=DOCS, help="where the figures go")
    parser.add_argument("--sizes", type=int, default=len(sizes), help="only the N smallest")
    given = parser.parse_args(arguments)
    if not given.draw_only:
        report.write_json(sweep(sizes[: given.sizes]), given.json)
    draw(json.loads(given.json.read_text()), given.folder)
