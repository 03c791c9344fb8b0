"""Pooling over sizes: measures a sweep, and draws it for docs/pooling.md.

    python benchmarks/pool_plots.py --json FILE                measures (3 minutes), draws
    python benchmarks/pool_plots.py --json FILE --draw-only    draws what FILE holds

Max and average pooling of 2×2 windows with stride 2 and 3×3 windows with stride 2, float32 and
bfloat16, contiguous and channels-last, on inputs from 10 KB to 200 MB, by the measuring code of
`python -m weft bench`. Two figures: PyTorch's time over weft's, and weft's fraction of the copy
bandwidth of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sweeps import COLOURS, EFFORT, RATIO, TITLES, Report, finish, measure_rows, plot, run, save

from weft.bench.rows import PoolRow

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
FIGURES = {
    "pooling_ratio.svg": ("ratio", RATIO),
    "pooling_bandwidth.svg": ("fraction_of_ceiling", "fraction of the copy bandwidth"),
}


def sweep(sizes: Sequence[tuple[int, ...]]) -> Report:
    """Measures every combination."""
    rows = [
        PoolRow(op, dtype, layout, False, size, *window)
        for op in OPS
        for window in WINDOWS
        for dtype in DTYPES
        for layout in LAYOUTS
        for size in sizes
    ]
    return measure_rows(
        [(row, {"input_bytes": torch.Size(row.size).numel() * row.dtype.itemsize}) for row in rows],
        EFFORT,
    )


def draw(found: Report, folder: Path) -> None:
    """Writes both figures: a panel per op and direction, a line per window, dtype and layout."""
    for name, (key, label) in FIGURES.items():
        figure = Figure(figsize=(10, 7), layout="constrained")
        panels = figure.subplots(len(OPS), len(TITLES), sharex=True, sharey=True, squeeze=False)
        for i, op in enumerate(OPS):
            for j, (direction, title) in enumerate(TITLES.items()):
                lines: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
                for row in found["rows"]:
                    if (row["op"], row["direction"]) == (op, direction):
                        window = row["shape"].split(" ", 1)[1]
                        line = lines.setdefault((row["dtype"], row["layout"], window), [])
                        line.append((row["input_bytes"], row[key]))
                for (dtype, layout, window), points in lines.items():
                    plot(
                        panels[i][j],
                        points,
                        color=COLOURS[dtype, layout],
                        linestyle="-" if window.startswith("k2") else "--",
                        label=f"{dtype} {layout} {window}",
                    )
                finish(panels[i][j], f"{op}, {title}", key == "ratio")
        save(figure, panels, found, "bytes of the input", label, folder / name)


def main(arguments: Sequence[str] | None = None) -> None:
    run("pooling over sizes: measure and draw", SIZES, sweep, draw, arguments)


if __name__ == "__main__":
    main()
