"""Random problems: what the published rows do not list counts the same.

A family registers a generator, a function from a `random.Random` to a row. The same seed gives the
same problems on every machine. `python -m weft bench <family> --unlisted 60 --seed 1` measures them
and reports them as it reports the published rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from weft.bench.rows import (
    MEMORY_FORMAT,
    CellRow,
    Cost,
    Direction,
    LayerRow,
    Row,
    pool_cost,
    random_tensor,
)

_LAYOUTS = {1: ("NCL",), 2: ("NCHW", "NHWC"), 3: ("NCDHW", "NDHWC")}
_DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LEAST_BYTES, _MOST_BYTES = 1e5, 3e7
_MOST_FLOPS, _MOST_RNN_FLOPS = 3e9, 3e10  # forward of a convolution; both passes of a recurrence
_MOST_F16_FLOPS = 1e8  # forward of a convolution, which takes PyTorch's CPU a hundred times as long


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


@dataclass(frozen=True)
class AnyPoolRow(Row):
    """Pooling of [N, C, spatial axes] with any arguments of torch's module."""

    family = "pool"
    size: tuple[int, ...]
    module: str
    options: tuple[tuple[str, Any], ...]

    @property
    def shape(self) -> str:
        short = {"kernel_size": "k", "stride": "s", "padding": "p", "output_size": "to "}
        parts = [short.get(name, f"{name}=") + _text(value) for name, value in self.options]
        return " ".join([_text(self.size), *parts])

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


@dataclass(frozen=True)
class AnyConvRow(Row):
    """Convolution of [N, C, spatial axes] with any arguments of torch's module."""

    family = "conv"
    size: tuple[int, ...]
    module: str
    out_channels: int
    kernel_size: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def shape(self) -> str:
        short = {"stride": "s", "padding": "p", "dilation": "d", "groups": "g"}
        parts = [short.get(name, f"{name}=") + _text(value) for name, value in self.options]
        window = f"K{self.out_channels} k{_text(self.kernel_size)}"
        return " ".join([_text(self.size), window, *parts])

    def native(self) -> torch.nn.Module:
        module: torch.nn.Module = self._module("cpu").to(memory_format=MEMORY_FORMAT[self.layout])
        return module

    def _module(self, device: str) -> Any:
        make = getattr(torch.nn, self.module)
        placed = {"dtype": self.dtype, "device": device}
        return make(
            self.size[1], self.out_channels, self.kernel_size, **dict(self.options), **placed
        )

    def inputs(self) -> tuple[Tensor, ...]:
        return (random_tensor(self.size, self.dtype, self.layout),)

    def cost(self, direction: Direction) -> Cost:
        module = self._module("meta")
        with torch.no_grad():
            output = module(torch.empty(self.size, dtype=self.dtype, device="meta"))
        inputs, outputs = math.prod(self.size), output.numel()
        weights = sum(p.numel() for p in module.parameters())
        bias = self.out_channels if dict(self.options).get("bias", True) else 0
        # A transposed one is counted by its input, each of which goes to all places of a window.
        walked = inputs if "Transpose" in self.module else outputs
        channels = self.size[1] if "Transpose" in self.module else self.out_channels
        flops = 2 * walked * (weights - bias) // channels
        moved = inputs + weights + outputs
        if direction == "f":
            return Cost(moved * self.dtype.itemsize, flops)
        moved += outputs + inputs + weights - bias + inputs + weights
        return Cost(moved * self.dtype.itemsize, 3 * flops)

    def with_batch(self, batch: int) -> AnyConvRow:
        return replace(self, size=(batch, *self.size[1:]))


def random_conv(random: Random) -> AnyConvRow:
    """Any convolution of at most 3 GFLOP (0.1 in float16) and 30 MB: depthwise, grouped, dense,
    pointwise, first layers and transposed ones, of all ranks, layouts and dtypes, with windows of 1
    to 9."""
    while True:
        row = _any_conv(random)
        cost = row.cost("f")
        most = _MOST_F16_FLOPS if row.dtype == torch.float16 else _MOST_FLOPS
        if _LEAST_BYTES < cost.bytes < _MOST_BYTES and cost.flops < most:
            return row


def _any_conv(random: Random) -> AnyConvRow:
    rank = random.choice((1, 2, 2, 2, 3))
    most = {1: 4096, 2: 256, 3: 24}[rank]
    spatial = [min(e, most) for e in _extents(random, rank)]
    kind = random.choice(("depthwise", "depthwise", "grouped", "dense", "dense", "point", "first"))
    transposed = random.random() < 0.25
    channels = random.choice((3, 8, 16, 24, 32, 40, 64, 96, 128, 200, 256, 384))
    outputs = random.choice((8, 16, 24, 32, 64, 100, 128, 256))
    groups = 1
    if kind == "depthwise":
        groups, outputs = channels, channels * random.choice((1, 1, 1, 2))
    elif kind == "grouped":
        groups = random.choice((2, 4, 8))
        channels, outputs = _multiple(channels, groups), _multiple(outputs, groups)
    elif kind == "first":
        channels = random.choice((1, 2, 3, 4))
    side = 1 if kind == "point" else random.choice((2, 3, 3, 3, 4, 5, 7, 9))
    sizes = [min(side, e) for e in spatial]
    stride = random.choice((1, 1, 1, 2, 2, 3)) if kind != "point" else random.choice((1, 1, 1, 2))
    options: dict[str, Any] = {"stride": stride}
    if random.random() < 0.7:
        options["padding"] = tuple(s // 2 for s in sizes)
    spans = [2 * (s - 1) + 1 for s in sizes]
    if max(sizes) > 1 and random.random() < 0.15 and all(map(int.__le__, spans, spatial)):
        options["dilation"] = 2
    if groups > 1:
        options["groups"] = groups
    if random.random() < 0.3:
        options["bias"] = False
    size = (random.choice((1, 1, 2, 4, 8, 16)), channels, *spatial)
    name = f"Conv{'Transpose' if transposed else ''}{rank}d"
    op = f"conv{'_transpose' if transposed else ''}{rank}d"
    dtype, layout = random.choice(_DTYPES), random.choice(_LAYOUTS[rank])
    settings = tuple(options.items())
    return AnyConvRow(op, dtype, layout, True, size, name, outputs, tuple(sizes), settings)


def _multiple(count: int, of: int) -> int:
    return max(1, count // of) * of


def random_rnn(random: Random) -> CellRow | LayerRow:
    """Cells and layers of at most 30 GFLOP: 1 to 96 rows, 16 to 768 units, up to 200 steps."""
    while True:
        cell = random.random() < 0.4
        hidden = round(math.exp(random.uniform(math.log(16), math.log(768))))
        if random.random() < 0.5:
            hidden = max(16, hidden // 16 * 16)
        batch = random.choice((1, 1, 2, 5, 8, 16, 20, 32, 64, 96))
        name = random.choice(("lstm", "gru", "rnn"))
        dtype = random.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16))
        row: CellRow | LayerRow
        if cell:
            row = CellRow(f"{name}_cell", dtype, "", True, batch, hidden)
        else:
            steps = round(math.exp(random.uniform(math.log(4), math.log(200))))
            padded = batch > 1 and random.random() < 0.15
            row = LayerRow(
                name, dtype, "", True, steps, batch, hidden, random.choice((1, 1, 2)), padded
            )
        if row.cost("fb").flops < _MOST_RNN_FLOPS and row.cost("fb").bytes < 2e8:
            return row


GENERATORS: dict[str, Callable[[Random], Row]] = {
    "pool": random_pool,
    "conv": random_conv,
    "rnn": random_rnn,
}


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
