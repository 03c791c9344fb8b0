"""Convolution over sizes: measures a sweep, and draws it for docs/convolution.md.

    python benchmarks/conv_plots.py --json FILE                measures (4 minutes), draws
    python benchmarks/conv_plots.py --json FILE --draw-only    draws what FILE holds

Depthwise 3×3 and 7×7, pointwise and dense 3×3 convolutions, float32 and bfloat16, contiguous and
channels-last, on maps from 7×7 to 112×112, by the measuring code of `python -m weft bench`. Two
figures: PyTorch's time over weft's, and weft's fraction of what bounds it in that run: the copy's
bandwidth or the matrix product's rate, whichever allows less.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sweeps import COLOURS, EFFORT, RATIO, TITLES, Report, finish, measure_rows, plot, run, save

from weft.bench.rows import ConvRow

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
FIGURES = {
    "convolution_ratio.svg": ("ratio", RATIO),
    "convolution_ceiling.svg": ("fraction_of_ceiling", "fraction of the run's ceiling"),
}


def sweep(sizes: Sequence[tuple[int, int, int]]) -> Report:
    """Measures every combination."""
    rows = [
        (ConvRow("conv2d", dtype, layout, False, (n, c, e, e), c, k, 1, pad, 1, groups), kind)
        for kind, (k, pad, depthwise) in KINDS.items()
        for dtype in DTYPES
        for layout in LAYOUTS
        for n, c, e in sizes
        for groups in [c if depthwise else 1]
    ]
    return measure_rows(
        [
            (row, {"kind": kind, "input_bytes": torch.Size(row.size).numel() * row.dtype.itemsize})
            for row, kind in rows
        ],
        EFFORT,
    )


def draw(found: Report, folder: Path) -> None:
    """Writes both figures: a panel per kind and direction, a line per dtype and layout."""
    for name, (key, label) in FIGURES.items():
        figure = Figure(figsize=(12, 6), layout="constrained")
        panels = figure.subplots(len(TITLES), len(KINDS), sharey=True, squeeze=False)
        for i, (direction, title) in enumerate(TITLES.items()):
            for j, kind in enumerate(KINDS):
                for (dtype, layout), colour in COLOURS.items():
                    points = [
                        (row["input_bytes"], row[key])
                        for row in found["rows"]
                        if (row["kind"], row["direction"]) == (kind, direction)
                        and (row["dtype"], row["layout"]) == (dtype, layout)
                    ]
                    if points:
                        plot(panels[i][j], points, color=colour, label=f"{dtype} {layout}")
                finish(panels[i][j], f"{kind}, {title}", key == "ratio")
        save(figure, panels, found, "bytes of the input", label, folder / name)


def main(arguments: Sequence[str] | None = None) -> None:
    run("convolution over sizes: measure and draw", SIZES, sweep, draw, arguments)


if __name__ == "__main__":
    main()
