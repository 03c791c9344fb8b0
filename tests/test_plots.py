"""The sweeps over sizes that docs/ shows: measured and drawn, in a tiny form."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(plots: ModuleType, folder: Path, title: str) -> None:
    """Measures and draws one size, and draws it again from the file."""
    arguments = ["--json", str(folder / "sizes.json"), "--folder", str(folder)]
    plots.main([*arguments, "--sizes", "1"])
    first = {name: (folder / name).read_text() for name in plots.FIGURES}
    assert all(title in text for text in first.values())
    plots.main([*arguments, "--draw-only"])
    assert {name: (folder / name).read_text() for name in plots.FIGURES} == first


def test_pooling_is_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots = load("plots")
    monkeypatch.setattr(plots, "OPS", ("max_pool2d",))
    monkeypatch.setattr(plots, "WINDOWS", ((2, 2, 0),))
    monkeypatch.setattr(plots, "DTYPES", (torch.float32,))
    monkeypatch.setattr(plots, "LAYOUTS", ("NCHW",))
    monkeypatch.setattr(plots, "EFFORT", plots.Effort(0.001, 2, 2))
    check(plots, tmp_path, "max_pool2d, forward")


def test_convolution_is_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots = load("conv_plots")
    monkeypatch.setattr(plots, "KINDS", {"depthwise 3×3": (3, 1, True)})
    monkeypatch.setattr(plots, "DTYPES", (torch.float32,))
    monkeypatch.setattr(plots, "LAYOUTS", ("NHWC",))
    monkeypatch.setattr(plots, "EFFORT", plots.Effort(0.001, 2, 2))
    check(plots, tmp_path, "depthwise 3×3, forward")
