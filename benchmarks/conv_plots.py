"""Convolution over sizes: measures a sweep, and draws it for docs/convolution.md.

    python benchmarks/conv_plots.py --json FILE                measures (4 minutes), draws
    python benchmarks/conv_plots.py --json FILE --draw-only    draws what FILE holds

Depthwise 3×3 and 7×7, pointwise and dense 3×3 convolutions, float32 and bfloat16, contiguous and
channels-last, on maps from 7×7 to 112×112, by the measuring code of `python -m weft bench`. Two
figures: PyTorch's time over weft's, and weft's fraction of what bounds it in that run: the copy's
bandwidth or the matrix product's rate, whichever allows less.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from weft import facts
from weft.bench import report
from weft.bench.measure import Ceilings, Effort, measure
from weft.bench.rows import DIRECTIONS, ConvRow

# Window, padding, and whether each channel is a group of its own.
KINDS = {
    "depthwise 3×3": (3, 1, True),
    "depthwise 7×7": (7, 3, True),
    "pointwise": (1, 0, False),
    "dense 3×3": (3, 1, False),
}
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = ("NCHW", "NHWC")
# Batch, channels, extent: as the stages of a network, from the last to the first.
SIZES = ((1, 128, 7), (8, 256, 7), (8, 256, 14), (8, 128, 28), (8, 64, 56), (8, 32, 112))
EFFORT = Effort(seconds=0.15, least=3, most=30)
DOCS = Path(__file__).parent.parent / "docs"
FIGURES = {
    "convolution_ratio.svg": ("ratio", "PyTorch's time / weft's time"),
    "convolution_ceiling.svg": ("fraction_of_ceiling", "fraction of the run's ceiling"),
}
COLOURS = {
    ("float32", "NCHW"): "#1f4e79",
    ("float32", "NHWC"): "#7fa8d1",
    ("bfloat16", "NCHW"): "#a8470f",
    ("bfloat16", "NHWC"): "#e5a270",
}


def sweep(sizes: Sequence[tuple[int, int, int]], effort: Effort) -> dict[str, Any]:
    """Measures every combination; returns the report as it stands in JSON."""
    device = torch.device("cpu")
    problems = [
        (kind, size, dtype, layout)
        for kind in KINDS
        for dtype in DTYPES
        for layout in LAYOUTS
        for size in sizes
    ]
    ceilings, measured = Ceilings(device), []
    with report.progress_bar() as progress:
        bar = progress.add_task("", total=len(problems) * len(DIRECTIONS))
        for kind, (n, c, extent), dtype, layout in problems:
            window, padding, depthwise = KINDS[kind]
            size, groups = (n, c, extent, extent), c if depthwise else 1
            row = ConvRow("conv2d", dtype, layout, False, size, c, window, 1, padding, 1, groups)
            for direction in DIRECTIONS:
                progress.update(bar, description=f"{row} {direction}")
                found = measure(row, direction, device, ceilings, effort)
                measured.append({**found, "kind": kind, "input_bytes": row.inputs()[0].nbytes})
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
    """Writes both figures: a panel per kind and direction, a line per dtype and layout."""
    import matplotlib
    from matplotlib.figure import Figure

    # The same file for the same numbers.
    matplotlib.rcParams.update({"svg.hashsalt": "weft", "svg.fonttype": "none"})
    directions = {"f": "forward", "fb": "forward and backward"}
    folder.mkdir(parents=True, exist_ok=True)
    for name, (key, label) in FIGURES.items():
        figure = Figure(figsize=(12, 6), layout="constrained")
        panels = figure.subplots(len(directions), len(KINDS), sharey=True, squeeze=False)
        for line, direction in enumerate(directions):
            for axes, kind in zip(panels[line], KINDS, strict=True):
                for (dtype, layout), colour in COLOURS.items():
                    points = sorted(
                        (row["input_bytes"], row[key])
                        for row in found["rows"]
                        if (row["kind"], row["direction"]) == (kind, direction)
                        and (row["dtype"], row["layout"]) == (dtype, layout)
                    )
                    if points:
                        xs, ys = zip(*points, strict=True)
                        style = {"color": colour, "marker": "o", "markersize": 3}
                        axes.plot(xs, ys, **style, label=f"{dtype} {layout}")
                axes.set_title(f"{kind}, {directions[direction]}", fontsize=9)
                axes.set_xscale("log")
                axes.axhline(1, color="black", linewidth=0.8)
                if key == "ratio":
                    axes.set_yscale("log")
                    axes.yaxis.set_major_formatter("{x:g}")
                axes.grid(alpha=0.3)
        for axes in panels[-1]:
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
    parser = argparse.ArgumentParser(description="convolution over sizes: measure and draw")
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
