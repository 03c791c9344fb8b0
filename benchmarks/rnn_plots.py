"""Recurrent layers over sizes: measures a sweep, and draws it for docs/recurrence.md.

    python benchmarks/rnn_plots.py --json FILE                measures (5 minutes), draws
    python benchmarks/rnn_plots.py --json FILE --draw-only    draws what FILE holds

LSTM, GRU and Elman layers in float32, 10 and 100 steps of 1, 16 and 64 rows, 32 to 1024 units (the
input is as wide), as far as a product stays below `MOST`, by the measuring code of
`python -m weft bench`. The figure shows PyTorch's time over weft's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sweeps import EFFORT, RATIO, TITLES, Report, finish, measure_rows, plot, run, save

from weft.bench.rows import LayerRow

OPS = ("lstm", "gru", "rnn")
STEPS = (10, 100)
BATCHES = (1, 16, 64)
HIDDEN = (32, 64, 128, 256, 512, 1024)
MOST = 2**31  # steps x rows x units x units
COLOURS = dict(zip(BATCHES, ("#1f4e79", "#a8470f", "#4c7a34"), strict=True))
FIGURES = {"recurrence_ratio.svg": ("ratio", RATIO)}


def sweep(hidden: Sequence[int]) -> Report:
    """Measures every combination."""
    rows = [
        LayerRow(op, torch.float32, "", False, steps, batch, units)
        for op in OPS
        for steps in STEPS
        for batch in BATCHES
        for units in hidden
        if steps * batch * units**2 <= MOST
    ]
    sizes = [{"steps": row.steps, "batch": row.batch, "hidden": row.hidden} for row in rows]
    return measure_rows(list(zip(rows, sizes, strict=True)), EFFORT)


def draw(found: Report, folder: Path) -> None:
    """A panel per layer and direction, a line per number of steps and rows."""
    for name, (key, label) in FIGURES.items():
        figure = Figure(figsize=(10, 10), layout="constrained")
        panels = figure.subplots(len(OPS), len(TITLES), sharex=True, sharey=True, squeeze=False)
        for i, op in enumerate(OPS):
            for j, (direction, title) in enumerate(TITLES.items()):
                lines: dict[tuple[int, int], list[tuple[int, float]]] = {}
                for row in found["rows"]:
                    if (row["op"], row["direction"]) == (op, direction):
                        line = lines.setdefault((row["steps"], row["batch"]), [])
                        line.append((row["hidden"], row[key]))
                for (steps, batch), points in lines.items():
                    plot(
                        panels[i][j],
                        points,
                        color=COLOURS[batch],
                        linestyle="--" if steps == min(STEPS) else "-",
                        label=f"T {steps}, B {batch}",
                    )
                finish(panels[i][j], f"{op}, float32, {title}", True, base=2)
        save(figure, panels, found, "units H (the input is as wide)", label, folder / name)


def main(arguments: Sequence[str] | None = None) -> None:
    run("recurrent layers over sizes: measure and draw", HIDDEN, sweep, draw, arguments)


if __name__ == "__main__":
    main()
