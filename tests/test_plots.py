"""The sweeps over sizes that docs/ shows: measured and drawn, in a tiny form."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from weft.bench.measure import Effort

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "pool_plots": (
        "max_pool2d, forward",
        {
            "OPS": ("max_pool2d",),
            "WINDOWS": ((2, 2, 0),),
            "DTYPES": (torch.float32,),
            "LAYOUTS": ("NCHW",),
        },
    ),
    "conv_plots": (
        "depthwise 3×3, forward",
        {
            "KINDS": {"depthwise 3×3": (3, 1, True)},
            "DTYPES": (torch.float32,),
            "LAYOUTS": ("NCHW",),
        },
    ),
    "rnn_plots": ("gru, float32, forward", {"OPS": ("gru",), "STEPS": (3,), "BATCHES": (1, 16)}),
}


@pytest.mark.parametrize("script", FAMILIES)
def test_one_size_is_measured_and_drawn(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And drawn again, equal, from the file."""
    title, cut = FAMILIES[script]
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    plots = importlib.import_module(script)
    for name, value in {**cut, "EFFORT": Effort(0.001, 2, 2)}.items():
        monkeypatch.setattr(plots, name, value)
    arguments = ["--json", str(tmp_path / "sizes.json"), "--folder", str(tmp_path)]
    plots.main([*arguments, "--sizes", "1"])
    first = {name: (tmp_path / name).read_text() for name in plots.FIGURES}
    assert all(title in text for text in first.values())
    plots.main([*arguments, "--draw-only"])
    assert {name: (tmp_path / name).read_text() for name in plots.FIGURES} == first
