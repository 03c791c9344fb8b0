"""What was measured, for people (a table, a plot) and for programs (JSON)."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from weft import facts
from weft.bench.measure import FULL, ON_CUDA, QUICK, Ceilings, measure
from weft.bench.rows import FAMILIES, rows
from weft.bench.unlisted import GENERATORS, unlisted

_WIDTH = 150


def console(stderr: bool = False) -> Console:
    """A console that does not fold tables where output goes to a file."""
    result = Console(stderr=stderr)
    if not result.is_terminal:
        result.width = max(result.width, _WIDTH)
    return result


def progress_bar() -> Progress:
    """On standard error, so that standard output is the table alone."""
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console(stderr=True),
    )


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    for scale, unit in units:
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    scale, unit = units[-1]
    return f"{value / scale:.3g} {unit}"


def seconds(value: float) -> str:
    """E.g. "1.25 ms"."""
    return _scaled(value, [(1, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")])


def byte_count(value: float) -> str:
    """E.g. "24.5 MiB"."""
    return _scaled(value, [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B")])


def run(
    families: Sequence[str],
    device: torch.device,
    full: bool,
    random: int = 0,
    seed: int = 0,
    json_path: Path | None = None,
    apart: bool = True,
) -> dict[str, Any]:
    """Measures the rows of `families` with a progress bar; returns the report as it stands in JSON.

    A row that raises a RuntimeError is named under "failed", and the others are measured.

    Args:
        families: of `FAMILIES`; empty means all.
        full: all published rows with more repetitions; else the quick ones.
        random: measure instead this many random problems of each family that has a generator.
        seed: of the random problems.
        json_path: where the report is written after each row: none is lost with the process.
        apart: on the CPU each row in a process of its own.
    """
    if random:
        chosen = [
            row for family in families or GENERATORS for row in unlisted(family, random, seed)
        ]
    else:
        chosen = [row for family in families or FAMILIES for row in rows(family, device, full)]
    tasks = [(row, direction) for row in chosen for direction in row.directions]
    ceilings = Ceilings(device)
    effort = ON_CUDA if device.type == "cuda" else FULL if full else QUICK
    measured: list[dict[str, Any]] = []
    failed: list[str] = []
    started = datetime.now(UTC)
    machine, versions = facts.machine(), facts.versions()

    def result() -> dict[str, Any]:
        return {
            "date": started.isoformat(timespec="seconds"),
            "seconds": (datetime.now(UTC) - started).total_seconds(),
            "full": full,
            **({"unlisted": random, "seed": seed} if random else {}),
            "machine": machine,
            "versions": versions,
            "threads": torch.get_num_threads(),
            "one_process": not apart,
            "ceilings": ceilings.as_dict(),
            "rows": measured,
            **({"failed": failed} if failed else {}),
        }

    with progress_bar() as progress:
        bar = progress.add_task("", total=len(tasks))
        for row, direction in tasks:
            progress.update(bar, description=f"{row} {direction}")
            try:
                measured.append(measure(row, direction, device, ceilings, effort, apart))
            except RuntimeError as error:
                failed.append(f"{row} {direction}: {error}")
            if json_path is not None:
                write_json(result(), json_path)
            progress.advance(bar)
        progress.update(bar, description="done")
    return result()


def summary(measured: Sequence[dict[str, Any]]) -> list[str]:
    """Geometric mean of the ratio for each family and direction, and how many rows fall short."""
    groups = defaultdict(list)
    for row in measured:
        key = (row["family"], row["direction"], row.get("baseline", "PyTorch"))
        groups[key].append(row["ratio"])
    lines = []
    for (family, direction, baseline), ratios in groups.items():
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        slower = sum(ratio < 1 for ratio in ratios)
        lines.append(
            f"{family} {direction}: {mean:.2f}x the speed of {baseline} (geometric mean of "
            f"{len(ratios)} rows), {slower} below 1.0"
        )
    return lines


def show(report: dict[str, Any]) -> None:
    """Prints a table."""
    out = console()
    machine, versions, ceilings = report["machine"], report["versions"], report["ceilings"]
    place = machine["gpus"][0] if ceilings["device"] == "cuda" else machine["cpu"]
    products = ", ".join(
        f"{dtype} product {rate / 1e9:.0f} GFLOP/s"
        for dtype, rate in ceilings["matmul_flops_per_s"].items()
    )
    table = Table(
        title=f"{place}, {report['threads']} threads, {machine['instruction_set']}, "
        f"torch {versions['torch']}",
        caption=f"ceilings: copy {ceilings['copy_bytes_per_s'] / 1e9:.1f} GB/s, {products}\n"
        "ratio = PyTorch's time / weft's; f: forward, fb: forward and backward; "
        "memory: weft / PyTorch",
    )
    for name in ("op", "shape", "dtype", "layout", ""):
        table.add_column(name)
    for name in ("weft", "PyTorch", "ratio", "of ceiling", "peak memory", "kept for backward"):
        table.add_column(name, justify="right")
    before = None
    for row in report["rows"]:
        if before not in (None, row["family"]):
            table.add_section()
        before = row["family"]
        ratio = f"{row['ratio']:.2f}"
        kept = f"{byte_count(row['kept_bytes'])} / {byte_count(row['native_kept_bytes'])}"
        table.add_row(
            row["op"],
            row["shape"],
            row["dtype"],
            row["layout"],
            row["direction"],
            seconds(row["weft_s"]),
            seconds(row["native_s"]),
            ratio if row["ratio"] >= 1 else f"[red]{ratio}[/red]",
            f"{row['fraction_of_ceiling']:.0%}",
            f"{byte_count(row['peak_bytes'])} / {byte_count(row['native_peak_bytes'])}",
            kept if row["direction"] != "f" else "",
        )
    out.print(table)
    for line in summary(report["rows"]):
        out.print(line)


def write_json(report: dict[str, Any], path: Path) -> None:
    """Writes a report, making its folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def plot(report: dict[str, Any], path: Path) -> None:
    """Draws the ratio to PyTorch of every row that has one, forward and forward-backward, as
    horizontal bars.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure

    bars: dict[str, dict[str, float]] = defaultdict(dict)
    for row in report["rows"]:
        if row["baseline"] != "PyTorch":
            continue
        name = " ".join(
            part for part in (row["op"], row["shape"], row["dtype"], row["layout"]) if part
        )
        bars[name][row["direction"]] = row["ratio"]
    figure = Figure(figsize=(10, 1.5 + 0.4 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for offset, direction, label, colour in (
        (-0.2, "f", "forward", "#7fa8d1"),
        (0.2, "fb", "forward and backward", "#1f4e79"),
    ):
        places = [i + offset for i, ratios in enumerate(bars.values()) if direction in ratios]
        ratios = [ratios[direction] for ratios in bars.values() if direction in ratios]
        # Bars start at 1: to the right weft is faster, to the left slower.
        lengths = [ratio - 1 for ratio in ratios]
        drawn = axes.barh(places, lengths, height=0.38, left=1, label=label, color=colour)
        axes.bar_label(drawn, [f"{ratio:.2f}" for ratio in ratios], padding=3, fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(bars)), list(bars), fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.02)
    axes.set_xlabel("PyTorch's time / weft's time (log scale; 1 = equal)")
    place = report["machine"]["gpus"] if report["ceilings"]["device"] == "cuda" else None
    place = place[0] if place else report["machine"]["cpu"]
    axes.set_title(f"{place}, {report['threads']} threads, torch {report['versions']['torch']}")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
