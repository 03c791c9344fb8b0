"""`pytest benchmarks/`: the rows of `python -m weft bench`, each library a benchmark of its own.

    pytest benchmarks/bench_pool.py -k "max_pool2d and NHWC and fb"

Runs on the GPU where weft runs on one, else on the CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from weft import facts
from weft.bench.measure import Problem
from weft.bench.rows import Direction, Row


@pytest.fixture
def time_row(benchmark: Callable) -> Callable[[Row, Direction, str], None]:
    """Times one row by one library on rotating inputs."""

    def run(row: Row, direction: Direction, library: str) -> None:
        device = facts.devices()[-1]
        call = Problem(row, direction, device).call(library)
        counter = itertools.count()

        def once() -> None:
            call(next(counter))
            if device.type == "cuda":
                torch.cuda.synchronize()

        once()
        cost = row.cost(direction)
        benchmark.group = f"{row} {direction}"
        benchmark.extra_info.update(bytes=cost.bytes, flops=cost.flops)
        benchmark(once)

    return run
