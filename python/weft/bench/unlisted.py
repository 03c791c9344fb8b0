"""Random problems: what the published rows do not list counts the same.

A family registers a generator, a function from a `random.Random` to a row. The same seed gives the
same problems on every machine. `python -m weft bench <family> --unlisted 60 --seed 1` measures them
and reports them as it reports the published rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from weft.bench.rows import Cost, Direction, Row, pool_cost, random_tensor

_LAYOUTS = {1: ("NCL",), 2: ("NCHW", "NHWC"), 3: ("NCDHW", "NDHWC")}
_DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LEAST_BYTES, _MOST_BYTES = 1e5, 3e7


@dataclass(frozen=True)
class AnyPoolRow(Row):
    """Pooling of [N, C, spatial axes] with any arguments of torch's module."""

    family = "pool"
    size: tuple[int, ...]
    module: str
    options: tuple[tuple[str, Any], ...]

    @property
    def shape(self) -> str:
        def text(value: Any) -> str:
            return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)

        short = {"kernel_size": "k", "stride": "s", "padding": "p", "output_size": "to "}
        parts = [short.get(name, f"{name}=") + text(value) for name, value in self.options]
        return " ".join([text(self.size), *parts])

    def native(self) -> torch.nn.Module:
        module: torch.nn.Module = getattr(torch.nn, self.module)(**dict(self.options))
        return module

    def inputs(self) -> tuple[Tensor, ...]:
        return (random_tensor(self.size, self.dtype, self.layout),)

    def cost(self, direction: Direction) -> Cost:
        inputs = math.prod(self.size)
        # Torch's shape function alone: no memory and no work.
        outputs = self.native()(torch.empty(self.size, device="meta")).numel()
        sizes = dict(self.options).get("kernel_size")
        window = math.prod(sizes) if sizes else max(1, inputs // outputs)
        return pool_cost(self.op, inputs, outputs, window, self.dtype.itemsize, direction)

    def with_batch(self, batch: int) -> AnyPoolRow:
        size = (batch, *self.size[1:])
        return AnyPoolRow(
            self.op, self.dtype, self.layout, self.quick, size, self.module, self.options
        )


def _extents(random: Random, rank: int) -> list[int]:
    """Extents of a map, odd ones and unequal ones among them."""
    most = {1: 16384, 2: 256, 3: 48}[rank]
    least = {1: 16, 2: 5, 3: 4}[rank]
    extent = round(math.exp(random.uniform(math.log(least), math.log(most))))
    if random.random() < 0.5:
        return [extent] * rank
    return [max(least, round(extent * random.uniform(0.5, 1.5))) for _ in range(rank)]


def random_pool(random: Random) -> AnyPoolRow:
    """Any pooling of 0.1 to 30 MB: ranks, layouts, dtypes, windows of 1 to 13, batch 1 and more."""
    rank = random.choice((1, 2, 2, 2, 3))
    layout = random.choice(_LAYOUTS[rank])
    dtype = random.choice(_DTYPES)
    spatial = _extents(random, rank)
    wanted = math.exp(random.uniform(math.log(_LEAST_BYTES), math.log(_MOST_BYTES)))
    planes = max(1, round(wanted / (math.prod(spatial) * dtype.itemsize)))
    batch = 1 if random.random() < 0.3 else random.choice((2, 4, 8, 16, 32))
    channels = max(1, planes // batch)
    size = (batch, channels, *spatial)
    kind = random.choice(("Max", "Max", "Avg", "Avg", "AdaptiveMax", "AdaptiveAvg"))
    if kind == "Avg" and rank == 3 and dtype.itemsize == 2:
        dtype = torch.float32  # torch has no 3-d average of half types
    options: dict[str, Any] = {}
    if kind.startswith("Adaptive"):
        most = random.choice((1, 1, 7, 16))
        options["output_size"] = tuple(random.randint(1, min(most, e)) for e in spatial)
    else:
        equal = random.random() < 0.7
        sizes = [min(random.choice((1, 2, 2, 3, 3, 3, 5, 7, 9, 13)), e) for e in spatial]
        sizes = [min(sizes[0], *spatial)] * rank if equal else sizes
        options["kernel_size"] = tuple(sizes)
        strides = {"touching": sizes, "dense": [1] * rank, "two": [2] * rank}
        options["stride"] = tuple(strides[random.choice(("touching", "dense", "two"))])
        same = random.random() < 0.5
        options["padding"] = tuple(s // 2 if same else 0 for s in sizes)
        if random.random() < 0.3:
            options["ceil_mode"] = True
        if kind == "Avg" and random.random() < 0.3:
            options["count_include_pad"] = False
    op = f"{kind.lower().replace('adaptive', 'adaptive_')}_pool{rank}d"
    return AnyPoolRow(op, dtype, layout, True, size, f"{kind}Pool{rank}d", tuple(options.items()))


GENERATORS: dict[str, Callable[[Random], Row]] = {"pool": random_pool}


def unlisted(family: str, count: int, seed: int) -> list[Row]:
    """`count` random problems of `family`; the same ones for the same seed.

    Raises:
        ValueError: for a family that has no generator.
    """
    if family not in GENERATORS:
        raise ValueError(
            f"bench: no random problems of family {family!r}; expected one of {sorted(GENERATORS)}"
        )
    random = Random(f"{family} {seed}")
    return [GENERATORS[family](random) for _ in range(count)]
