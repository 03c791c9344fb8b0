"""Convolution rows under pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from weft import facts
from weft.bench.rows import DIRECTIONS, Direction, Row, rows


@pytest.mark.parametrize("library", ["weft", "native"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("row", rows("conv", facts.devices()[-1]), ids=str)
def test_time(row: Row, direction: Direction, library: str, time_row: Callable) -> None:
    time_row(row, direction, library)
