"""The sweeps over sizes that docs/ shows: measured and drawn, in a tiny form."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


def test_one_row_is_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots = script("plots", monkeypatch)
    monkeypatch.setattr(plots, "OPS", ("max_pool2d",))
    monkeypatch.setattr(plots, "WINDOWS", ((2, 2, 0),))
    monkeypatch.setattr(plots, "DTYPES", (torch.float32,))
    monkeypatch.setattr(plots, "LAYOUTS", ("NCHW",))
    monkeypatch.setattr(plots, "EFFORT", plots.Effort(0.001, 2, 2))
    arguments = ["--json", str(tmp_path / "sizes.json"), "--folder", str(tmp_path)]
    plots.main([*arguments, "--sizes", "1"])
    first = {name: (tmp_path / name).read_text() for name in plots.FIGURES}
    assert all("max_pool2d, forward" in text for text in first.values())
    plots.main([*arguments, "--draw-only"])
    assert {name: (tmp_path / name).read_text() for name in plots.FIGURES} == first


def test_one_layer_is_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots = script("rnn_plots", monkeypatch)
    for name, value in {"OPS": ("gru",), "STEPS": (3,), "BATCHES": (1, 2, 3)}.items():
        monkeypatch.setattr(plots, name, value)
    monkeypatch.setattr(plots, "EFFORT", plots.Effort(0.001, 2, 2))
    arguments = ["--json", str(tmp_path / "sizes.json"), "--folder", str(tmp_path)]
    plots.main([*arguments, "--sizes", "1"])
    first = (tmp_path / plots.FIGURE).read_text()
    assert "gru, forward" in first
    plots.main([*arguments, "--draw-only"])
    assert (tmp_path / plots.FIGURE).read_text() == first
