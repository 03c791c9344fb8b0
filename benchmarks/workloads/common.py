"""What the workloads share: training two models side by side, and judging their curves.

One model runs on PyTorch's layers, the other on weft's (`weft.convert`). They start from equal
parameters and see equal batches, in turn, so that their losses can be compared step by step and
their times were taken on the same machine at the same time.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import weft
from weft import facts
from weft.bench import report

LIBRARIES = ("native", "weft")


@dataclass
class Run:
    """One model's training: the loss and the seconds of each step."""

    model: torch.nn.Module
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def step_seconds(self) -> float:
        """Median of a step."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Agreement:
    """How far two loss curves may be apart, relative to the native one (at least to `floor`).

    Both round differently, and training amplifies it from step to step. So the first steps must
    agree to a few roundings of float32, and the whole curve to what a plot can show.
    """

    early_steps: int
    early: float
    late: float
    floor: float = 1e-2

    def check(self, runs: dict[str, Run]) -> dict[str, float]:
        """The largest relative difference, early and over all steps.

        Raises:
            AssertionError: if one exceeds its bound.
        """
        native, ours = (torch.tensor(runs[name].losses, dtype=torch.float64) for name in LIBRARIES)
        difference = (ours - native).abs() / native.abs().clamp(min=self.floor)
        found = {
            "early": float(difference[: self.early_steps].max()),
            "late": float(difference.max()),
        }
        for name, bound in (("early", self.early), ("late", self.late)):
            if not found[name] <= bound:
                raise AssertionError(
                    f"the {name} loss curves differ by {found[name]:.2e}, more than {bound:.2e}"
                )
        return found

    def sentence(self, result: dict[str, Any]) -> str:
        """How far the curves of a workload's result are apart."""
        found = result["curve_difference"]
        return (
            f"loss curves differ by at most {found['early']:.1e} in the first {self.early_steps} "
            f"steps, {found['late']:.1e} in all {result['steps']} (relative)"
        )


def pair(model: torch.nn.Module) -> dict[str, Run]:
    """`model` itself, and a copy on weft's layers.

    Raises:
        RuntimeError: if weft exchanged no layer.
    """
    converted = weft.convert(copy.deepcopy(model))
    if not any(type(m).__module__.startswith("weft.") for m in converted.modules()):
        raise RuntimeError("weft.convert exchanged no layer: the model would be compared to itself")
    return {"native": Run(model), "weft": Run(converted)}


def train(
    runs: dict[str, Run],
    steps: int,
    step: Callable[[str, int], float],
    title: str,
) -> None:
    """Runs `step(library, index) -> loss` for each library in turn."""
    with report.progress_bar() as progress:
        bar = progress.add_task(title, total=steps)
        for index in range(steps):
            order = LIBRARIES if index % 2 == 0 else LIBRARIES[::-1]
            for library in order:
                begin = time.perf_counter()
                loss = step(library, index)
                runs[library].seconds.append(time.perf_counter() - begin)
                runs[library].losses.append(loss)
            progress.update(
                bar,
                advance=1,
                description=f"{title}: loss {runs['native'].losses[-1]:.4f} native, "
                f"{runs['weft'].losses[-1]:.4f} weft",
            )


def accuracies(
    runs: dict[str, Run], images: torch.Tensor, labels: torch.Tensor, least: float | None
) -> dict[str, float]:
    """The part of `images` that each library's model names rightly.

    Raises:
        AssertionError: if one is below `least`.
    """
    found = {}
    for name, run in runs.items():
        with torch.no_grad():
            right = run.model(images).argmax(1) == labels
        found[name] = right.double().mean().item()
        if least is not None and found[name] < least:
            raise AssertionError(f"{name} names {found[name]:.1%} of the images rightly")
    return found


def result(runs: dict[str, Run], agreement: dict[str, float], **more: Any) -> dict[str, Any]:
    """A workload's result as it stands in JSON; `more` are its own figures."""
    return {
        "steps": len(runs["native"].losses),
        "native_step_s": runs["native"].step_seconds,
        "weft_step_s": runs["weft"].step_seconds,
        "ratio": runs["native"].step_seconds / runs["weft"].step_seconds,
        "curve_difference": agreement,
        "native_losses": runs["native"].losses,
        "weft_losses": runs["weft"].losses,
        **more,
    }


def command_line(description: str, run: Callable[[], dict[str, Any]]) -> None:
    """`python <workload> [--json FILE]`: runs it; writes the results with machine and versions."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    arguments = parser.parse_args()
    results = run()
    if arguments.json:
        facts_of_run = {
            "machine": facts.machine(),
            "versions": facts.versions(),
            "threads": torch.get_num_threads(),
        }
        report.write_json({**facts_of_run, "results": results}, arguments.json)
