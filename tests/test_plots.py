"""The sweep over sizes that docs/pooling.md shows: measured and drawn, in a tiny form."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture
def plots() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plots", ROOT / "benchmarks" / "plots.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_row_is_measured_and_drawn(
    plots: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
