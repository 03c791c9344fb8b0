"""Recurrent layers over sizes: measures a sweep, and draws it for docs/recurrence.md.

    python benchmarks/rnn_plots.py --json FILE                measures (5 minutes), draws
    python benchmarks/rnn_plots.py --json FILE --draw-only    draws what FILE holds

LSTM, GRU and Elman layers in float32, 10 and 100 steps of 1, 16 and 64 rows, 32 to 1024 units (the
input is as wide), as far as a product stays below `MOST`, by the measuring code of
`python -m weft bench`. The figure shows PyTorch's time over weft's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from plots import DOCS, Effort, measure_rows

from weft.bench import report
from weft.bench.rows import LayerRow

OPS = ("lstm", "gru", "rnn")
STEPS = (10, 100)
BATCHES = (1, 16, 64)
HIDDEN = (32, 64, 128, 256, 512, 1024)
MOST = 2**31  # steps x rows x units x units
EFFORT = Effort(seconds=0.2, least=3, most=30)
FIGURE = "recurrence_ratio.svg"
DIRECTIONS = {"f": "forward", "fb": "forward and backward"}


def sweep(hidden: Sequence[int], effort: Effort) -> dict[str, Any]:
    """Measures every combination."""
    rows = [
        LayerRow(op, torch.float32, "", False, steps, batch, units)
        for op in OPS
        for steps in STEPS
        for batch in BATCHES
        for units in hidden
        if steps * batch * units**2 <= MOST
    ]

    def size(row: LayerRow) -> dict[str, int]:
        return {"steps": row.steps, "batch": row.batch, "hidden": row.hidden}

    return measure_rows(rows, effort, size)


def draw(found: dict[str, Any], folder: Path) -> None:
    """A panel per layer and direction, a line per number of steps and rows."""
    import matplotlib
    from matplotlib.figure import Figure

    # The same file for the same numbers.
    matplotlib.rcParams.update({"svg.hashsalt": "weft", "svg.fonttype": "none"})
    colours = dict(zip(BATCHES, ("#1f4e79", "#a8470f", "#4c7a34"), strict=True))
    figure = Figure(figsize=(10, 10), layout="constrained")
    panels = figure.subplots(len(OPS), len(DIRECTIONS), sharex=True, sharey=True, squeeze=False)
    for i, op in enumerate(OPS):
        for j, (direction, title) in enumerate(DIRECTIONS.items()):
            lines: dict[tuple[int, int], list[tuple[int, float]]] = {}
            for row in found["rows"]:
                if (row["op"], row["direction"]) == (op, direction):
                    line = lines.setdefault((row["steps"], row["batch"]), [])
                    line.append((row["hidden"], row["ratio"]))
            axes = panels[i][j]
            for (steps, batch), points in lines.items():
                axes.plot(
                    *zip(*sorted(points), strict=True),
                    color=colours[batch],
                    linestyle="--" if steps == min(STEPS) else "-",
                    marker="o",
                    markersize=3,
                    label=f"T {steps}, B {batch}",
                )
            axes.set_title(f"{op}, {title}", fontsize=10)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
            axes.axhline(1, color="black", linewidth=0.8)
            axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("units H (the input is as wide)")
    for axes in panels[:, 0]:
        axes.set_ylabel("PyTorch's time / weft's time")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(
        f"float32, {found['machine']['cpu']}, {found['threads']} threads, "
        f"torch {found['versions']['torch']}",
        fontsize=10,
    )
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / FIGURE, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="recurrent layers over sizes: measure and draw")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--draw-only", action="store_true", help="measure nothing")
    parser.add_argument("--folder", type=Path, default=DOCS, help="where the figure goes")
    parser.add_argument("--sizes", type=int, default=len(HIDDEN), help="only the N smallest")
    given = parser.parse_args(arguments)
    if not given.draw_only:
        report.write_json(sweep(HIDDEN[: given.sizes], EFFORT), given.json)
    draw(json.loads(given.json.read_text()), given.folder)


if __name__ == "__main__":
    main()
