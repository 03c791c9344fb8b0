"""The published rows: which problems weft is measured on, as data.

A row is a torch module, the size of its input and the least work that the problem needs. The shapes
are in the alphabet of CONTRIBUTING.md; "quick" marks the rows that are measured by default.

The least traffic counts each tensor once: forward reads input and parameters and writes the output;
backward reads the gradient of the output, reads again what its formula needs, and writes the
gradients. What an implementation keeps for itself is not counted, with one exception: a maximum can
be undone only if something of it is kept, and a byte per output element is the least that serves.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import weft
from weft.bench.steps import VARIANTS, Steps

Direction = Literal["f", "fb", "fbb"]
DIRECTIONS: tuple[Direction, ...] = ("f", "fb")

MEMORY_FORMAT = {
    "NCL": torch.contiguous_format,
    "NCHW": torch.contiguous_format,
    "NHWC": torch.channels_last,
    "NCDHW": torch.contiguous_format,
    "NDHWC": torch.channels_last_3d,
}
_CLASS = {
    "max_pool1d": torch.nn.MaxPool1d,
    "max_pool2d": torch.nn.MaxPool2d,
    "max_pool3d": torch.nn.MaxPool3d,
    "avg_pool1d": torch.nn.AvgPool1d,
    "avg_pool2d": torch.nn.AvgPool2d,
    "avg_pool3d": torch.nn.AvgPool3d,
    "adaptive_max_pool2d": torch.nn.AdaptiveMaxPool2d,
    "adaptive_avg_pool2d": torch.nn.AdaptiveAvgPool2d,
    "conv1d": torch.nn.Conv1d,
    "conv2d": torch.nn.Conv2d,
    "conv3d": torch.nn.Conv3d,
    "conv_transpose2d": torch.nn.ConvTranspose2d,
    "lstm_cell": torch.nn.LSTMCell,
    "gru_cell": torch.nn.GRUCell,
    "rnn_cell": torch.nn.RNNCell,
    "lstm": torch.nn.LSTM,
    "gru": torch.nn.GRU,
    "rnn": torch.nn.RNN,
}
_GATES = {"lstm": 4, "gru": 3, "rnn": 1}


class Cost(NamedTuple):
    """The least that a problem needs."""

    bytes: int
    flops: int


def _output_extent(extent: int, window: int, stride: int, padding: int, dilation: int = 1) -> int:
    return (extent + 2 * padding - dilation * (window - 1) - 1) // stride + 1


@dataclass(frozen=True)
class Row(ABC):
    """One problem. Subclasses say what the torch module, its inputs and its least work are."""

    family: ClassVar[str]
    baseline: ClassVar[str] = "PyTorch"
    op: str
    dtype: torch.dtype
    layout: str
    quick: bool

    @property
    @abstractmethod
    def shape(self) -> str:
        """The problem in one word or two, unique inside (op, dtype, layout)."""

    @abstractmethod
    def native(self) -> torch.nn.Module:
        """PyTorch's module, on the CPU, in the row's dtype and layout."""

    @abstractmethod
    def inputs(self) -> tuple[Tensor, ...]:
        """One set of random inputs on the CPU; all of them are differentiated in direction "fb"."""

    @property
    def directions(self) -> tuple[Direction, ...]:
        """What is measured: "f" forward, "fb" with backward, "fbb" with backward of that."""
        return DIRECTIONS

    def arguments(self, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """`inputs` as the module takes them."""
        return inputs

    def outputs(self, result: Any) -> tuple[Tensor, ...]:
        """Those results of the module that are differentiated."""
        return result if isinstance(result, tuple) else (result,)

    @abstractmethod
    def cost(self, direction: Direction) -> Cost:
        """The least traffic and the number of operations."""

    @abstractmethod
    def with_batch(self, batch: int) -> Row:
        """The same problem on `batch` samples."""

    def weft(self, native: torch.nn.Module) -> torch.nn.Module:
        """weft's module with the same parameters as `native`.

        Raises:
            RuntimeError: if weft has no layer for this row; the row would measure torch against
                itself.
        """
        module = weft.convert(copy.deepcopy(native))
        if type(module) is type(native):
            raise RuntimeError(f"bench: weft.convert leaves {type(native).__name__} as it is")
        return module

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return " ".join(part for part in (self.op, self.shape, dtype, self.layout) if part)


def pool_cost(
    op: str, inputs: int, outputs: int, window: int, itemsize: int, direction: Direction
) -> Cost:
    """Of `inputs` and `outputs` elements and windows of `window` elements."""
    moved = (inputs + outputs) * itemsize
    operations = outputs * window
    if direction == "f":
        return Cost(moved, operations)
    maximum = "max" in op
    place = (1 if window <= 256 else 4) if maximum else 0
    # Backward of a maximum adds one number per output, that of a mean one per window element.
    backward = outputs if maximum else operations
    return Cost(2 * moved + 2 * place * outputs, operations + backward)


@dataclass(frozen=True)
class PoolRow(Row):
    """Pooling of [N, C, spatial axes] with a window of one size on each axis."""

    family = "pool"
    size: tuple[int, ...]
    window: int
    stride: int
    padding: int

    @property
    def shape(self) -> str:
        size = "x".join(map(str, self.size))
        return f"{size} k{self.window} s{self.stride} p{self.padding}"

    def native(self) -> torch.nn.Module:
        return _CLASS[self.op](self.window, self.stride, self.padding)

    def inputs(self) -> tuple[Tensor, ...]:
        return (random_tensor(self.size, self.dtype, self.layout),)

    def cost(self, direction: Direction) -> Cost:
        planes, spatial = math.prod(self.size[:2]), self.size[2:]
        extents = [_output_extent(e, self.window, self.stride, self.padding) for e in spatial]
        outputs = planes * math.prod(extents)
        window = self.window ** len(spatial)
        return pool_cost(
            self.op, math.prod(self.size), outputs, window, self.dtype.itemsize, direction
        )

    def with_batch(self, batch: int) -> PoolRow:
        return replace(self, size=(batch, *self.size[1:]))


@dataclass(frozen=True)
class AdaptivePoolRow(Row):
    """Adaptive pooling of [N, C, H, W] to a square map; its extent divides H and W."""

    family = "pool"
    size: tuple[int, int, int, int]
    output: int

    @property
    def shape(self) -> str:
        return f"{'x'.join(map(str, self.size))} to {self.output}"

    def native(self) -> torch.nn.Module:
        return _CLASS[self.op](self.output)

    def inputs(self) -> tuple[Tensor, ...]:
        return (random_tensor(self.size, self.dtype, self.layout),)

    def cost(self, direction: Direction) -> Cost:
        n, c, h, w = self.size
        outputs = n * c * self.output**2
        window = (h // self.output) * (w // self.output)
        return pool_cost(self.op, n * c * h * w, outputs, window, self.dtype.itemsize, direction)

    def with_batch(self, batch: int) -> AdaptivePoolRow:
        return replace(self, size=(batch, *self.size[1:]))


@dataclass(frozen=True)
class ConvRow(Row):
    """Convolution of [N, C, spatial axes] to K channels, with bias; the window is the same on each.

    A transposed one of stride s makes s times as many positions per axis, so it counts its work by
    its input.
    """

    family = "conv"
    size: tuple[int, ...]
    out_channels: int
    window: int
    stride: int
    padding: int
    dilation: int
    groups: int

    @property
    def shape(self) -> str:
        size = "x".join(map(str, self.size))
        text = f"{size} K{self.out_channels} k{self.window} s{self.stride} p{self.padding}"
        text += f" d{self.dilation}" if self.dilation > 1 else ""
        return text + (f" g{self.groups}" if self.groups > 1 else "")

    def native(self) -> torch.nn.Module:
        module: torch.nn.Module = self._layer(_CLASS[self.op]).to(
            memory_format=MEMORY_FORMAT[self.layout]
        )
        return module

    def _layer(self, kind: Any, **options: Any) -> Any:
        return kind(
            self.size[1],
            self.out_channels,
            self.window,
            self.stride,
            self.padding,
            dilation=self.dilation,
            groups=self.groups,
            dtype=self.dtype,
            **options,
        )

    def _extent(self, extent: int) -> int:
        window = (self.window, self.stride, self.padding, self.dilation)
        return _output_extent(extent, *window)

    def inputs(self) -> tuple[Tensor, ...]:
        return (random_tensor(self.size, self.dtype, self.layout),)

    def cost(self, direction: Direction) -> Cost:
        n, c, *extents = self.size
        places = self.window ** len(extents)
        if self.op.startswith("conv_transpose"):
            span = self.dilation * (self.window - 1) + 1
            positions = math.prod((e - 1) * self.stride - 2 * self.padding + span for e in extents)
            products = math.prod(self.size) * (self.out_channels // self.groups) * places
        else:
            positions = math.prod(map(self._extent, extents))
            products = n * self.out_channels * positions * (c // self.groups) * places
        outputs = n * self.out_channels * positions
        weights = self.out_channels * (c // self.groups) * places
        parameters = weights + self.out_channels
        inputs = math.prod(self.size)
        moved = inputs + parameters + outputs
        flops = 2 * products
        if direction == "f":
            return Cost(moved * self.dtype.itemsize, flops)
        # Reads gy, x and the weights; writes gx and the parameters' gradients.
        moved += outputs + inputs + weights + inputs + parameters
        return Cost(moved * self.dtype.itemsize, 3 * flops)

    def with_batch(self, batch: int) -> ConvRow:
        return replace(self, size=(batch, *self.size[1:]))


@dataclass(frozen=True)
class BlockRow(ConvRow):
    """`weft.nn.ConvBlock2d`, ReLU included, against weft's own layers one by one.

    `pooling` is "", "max" or "avg", of 2×2.
    """

    family = "conv fused"
    baseline = "weft's layers one by one"
    pooling: str = ""

    def native(self) -> torch.nn.Module:
        pool = {"": None, "max": weft.nn.MaxPool2d, "avg": weft.nn.AvgPool2d}[self.pooling]
        layers = [self._layer(weft.nn.Conv2d), torch.nn.ReLU(), *([pool(2)] if pool else [])]
        module: Any = torch.nn.Sequential(*layers)
        return module.to(memory_format=MEMORY_FORMAT[self.layout])

    def weft(self, native: torch.nn.Module) -> torch.nn.Module:
        assert isinstance(native, torch.nn.Sequential)
        block = self._layer(weft.nn.ConvBlock2d, pooling=self.pooling or None)
        block.load_state_dict(native[0].state_dict())
        return block.to(memory_format=MEMORY_FORMAT[self.layout])

    def cost(self, direction: Direction) -> Cost:
        stage = super().cost(direction)
        if not self.pooling:
            return stage
        # The pooled map stands for the whole one, written and read; its windows touch.
        extents = [self._extent(e) for e in self.size[2:]]
        planes = self.size[0] * self.out_channels
        spared = planes * (math.prod(extents) - math.prod(e // 2 for e in extents))
        passes = 1 if direction == "f" else 2
        moved = stage.bytes - passes * spared * self.dtype.itemsize
        kept = planes * math.prod(e // 2 for e in extents)
        places = 2 * kept if direction == "fb" and self.pooling == "max" else 0
        return Cost(moved + places, stage.flops + passes * 4 * kept)


@dataclass(frozen=True)
class CellRow(Row):
    """One step of a recurrent cell on B rows; the input is as wide as the hidden state."""

    family = "rnn"
    batch: int
    hidden: int

    @property
    def shape(self) -> str:
        return f"B{self.batch} H{self.hidden}"

    @property
    def _states(self) -> int:
        return 2 if self.op == "lstm_cell" else 1

    def native(self) -> torch.nn.Module:
        return _CLASS[self.op](self.hidden, self.hidden, dtype=self.dtype)

    def inputs(self) -> tuple[Tensor, ...]:
        size = (self.batch, self.hidden)
        return tuple(random_tensor(size, self.dtype, self.layout) for _ in range(1 + self._states))

    def arguments(self, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        x, *state = inputs
        return x, tuple(state) if self._states == 2 else state[0]

    def cost(self, direction: Direction) -> Cost:
        state = self.batch * self.hidden
        gates = _GATES[self.op.removesuffix("_cell")]
        weights = 2 * gates * self.hidden**2
        parameters = weights + 2 * gates * self.hidden
        inputs, outputs = (1 + self._states) * state, self._states * state
        moved = inputs + parameters + outputs
        flops = 2 * self.batch * weights
        if direction == "f":
            return Cost(moved * self.dtype.itemsize, flops)
        # Reads the outputs' gradients, the inputs and the weights; writes the gradients.
        moved += outputs + inputs + weights + inputs + parameters
        return Cost(moved * self.dtype.itemsize, 3 * flops)

    def with_batch(self, batch: int) -> CellRow:
        return replace(self, batch=batch)


class Padded(torch.nn.Module):
    """A layer on a batch of sequences of `lengths`, padded to ``[T, B, I]``."""

    def __init__(self, layer: torch.nn.Module, lengths: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.lengths = lengths

    def forward(self, input: Tensor) -> Any:
        packed = pack_padded_sequence(input, self.lengths, enforce_sorted=False)
        output, state = self.layer(packed)
        return pad_packed_sequence(output, total_length=input.size(0))[0], state


class WithLengths(Padded):
    """The same by `lengths` of a layer of weft."""

    def forward(self, input: Tensor) -> Any:
        return self.layer(input, lengths=self.lengths)


@dataclass(frozen=True)
class LayerRow(Row):
    """A recurrent layer over T steps of B rows; the input is as wide as the hidden state.

    Where it is `padded`, rows end at different times, and half of all steps are padding.
    """

    family = "rnn"
    steps: int
    batch: int
    hidden: int
    layers: int = 1
    padded: bool = False
    twice: bool = False

    @property
    def shape(self) -> str:
        text = f"T{self.steps} B{self.batch} H{self.hidden}"
        text += f" x{self.layers}" if self.layers > 1 else ""
        return text + (" half padded" if self.padded else "")

    @property
    def directions(self) -> tuple[Direction, ...]:
        return (*DIRECTIONS, "fbb") if self.twice else DIRECTIONS

    @property
    def lengths(self) -> Tensor:
        """[B], of the padded rows: spread evenly, T / 2 in the mean."""
        middles = (2 * torch.arange(self.batch) + 1) * self.steps
        return (middles // (2 * self.batch)).clamp(min=1)

    def native(self) -> torch.nn.Module:
        layer = _CLASS[self.op](self.hidden, self.hidden, self.layers, dtype=self.dtype)
        return Padded(layer, self.lengths) if self.padded else layer

    def weft(self, native: torch.nn.Module) -> torch.nn.Module:
        if not isinstance(native, Padded):
            return super().weft(native)
        return Padded(super().weft(native.layer), native.lengths)

    def inputs(self) -> tuple[Tensor, ...]:
        return (random_tensor((self.steps, self.batch, self.hidden), self.dtype, self.layout),)

    def outputs(self, result: Any) -> tuple[Tensor, ...]:
        return (result[0],)

    def cost(self, direction: Direction) -> Cost:
        name = self.op.split("_")[0]
        gates = 3 if self.op == "lstm_coupled" else _GATES[name]
        weights = self.layers * 2 * gates * self.hidden**2
        parameters = weights + self.layers * 2 * gates * self.hidden
        rows = int(self.lengths.sum()) if self.padded else self.steps * self.batch
        inputs, outputs = rows * self.hidden, self.steps * self.batch * self.hidden
        states = self.layers * self.batch * self.hidden * (2 if name == "lstm" else 1)
        moved = inputs + parameters + outputs + states
        flops = 2 * rows * weights
        if direction == "f":
            return Cost(moved * self.dtype.itemsize, flops)
        # Reads the output's gradient, the input and the weights; writes the gradients.
        backward = inputs + inputs + weights + inputs + parameters
        moved += backward
        if direction == "fb":
            return Cost(moved * self.dtype.itemsize, 3 * flops)
        # Each product of forward and backward is differentiated by both of its factors.
        return Cost((moved + 2 * backward) * self.dtype.itemsize, 9 * flops)

    def with_batch(self, batch: int) -> LayerRow:
        return replace(self, batch=batch)


@dataclass(frozen=True)
class VariantRow(LayerRow):
    """A variant that torch lacks, against its steps in torch's own operations."""

    def native(self) -> torch.nn.Module:
        layer, options = VARIANTS[self.op]
        return Steps(layer(self.hidden, self.hidden, dtype=self.dtype, **options))

    def weft(self, native: torch.nn.Module) -> torch.nn.Module:
        assert isinstance(native, Steps)
        return copy.deepcopy(native.layer)


@dataclass(frozen=True)
class PlainRow(VariantRow):
    """A variant against weft's plain layer: what the addition costs."""

    family = "rnn variants"
    baseline = "weft's plain layer"

    @property
    def shape(self) -> str:
        return f"{super().shape} against plain"

    def native(self) -> torch.nn.Module:
        layer, _ = VARIANTS[self.op]
        return layer(self.hidden, self.hidden, dtype=self.dtype)

    def weft(self, native: torch.nn.Module) -> torch.nn.Module:
        layer, options = VARIANTS[self.op]
        return layer(self.hidden, self.hidden, dtype=self.dtype, **options)


@dataclass(frozen=True)
class LengthsRow(LayerRow):
    """A batch half of whose steps are padding, told by `lengths`, against the full one."""

    family = "rnn variants"
    baseline = "weft's layer on the full batch"
    padded: bool = True

    @property
    def shape(self) -> str:
        return f"{super().shape} against full"

    def native(self) -> torch.nn.Module:
        return weft.convert(_CLASS[self.op](self.hidden, self.hidden, dtype=self.dtype))

    def weft(self, native: torch.nn.Module) -> torch.nn.Module:
        return WithLengths(copy.deepcopy(native), self.lengths)


def random_tensor(size: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """Normal values on the CPU; a layout of "" leaves the strides as they come."""
    tensor = torch.randn(size, dtype=torch.float32).to(dtype)
    return tensor.contiguous(memory_format=MEMORY_FORMAT[layout]) if layout else tensor


_F32, _F64, _BF16 = torch.float32, torch.float64, torch.bfloat16
_Variant = tuple[torch.dtype, str, bool]


def _pool(
    op: str, size: tuple[int, ...], window: tuple[int, int, int], *variants: _Variant
) -> list[Row]:
    """One row for each (dtype, layout, quick); window is (size, stride, padding)."""
    return [PoolRow(op, *variant, size, *window) for variant in variants]


def _conv(
    size: tuple[int, ...],
    out_channels: int,
    window: tuple[int, int, int],
    *variants: _Variant,
    d: int = 1,
    g: int = 1,
    op: str = "",
) -> list[Row]:
    """One row for each (dtype, layout, quick); window is (size, stride, padding)."""
    op = op or f"conv{len(size) - 2}d"
    return [ConvRow(op, *variant, size, out_channels, *window, d, g) for variant in variants]


def _blocks(
    size: tuple[int, ...], out_channels: int, window: tuple[int, int, int], layout: str, g: int = 1
) -> list[Row]:
    """Bias and ReLU fused, and both poolings with them."""
    names = {"": "conv2d + relu", "max": "conv2d + relu + max", "avg": "conv2d + relu + avg"}
    return [
        BlockRow(op, _F32, layout, False, size, out_channels, *window, 1, g, pooling)
        for pooling, op in names.items()
    ]


_POOL: list[Row] = [
    *_pool(
        "max_pool2d",
        (32, 64, 112, 112),
        (3, 2, 1),
        (_F32, "NCHW", True),
        (_F32, "NHWC", True),
        (_F64, "NCHW", False),
        (_BF16, "NCHW", True),
        (_BF16, "NHWC", False),
    ),
    *_pool("max_pool2d", (32, 64, 112, 112), (2, 2, 0), (_F32, "NCHW", True)),
    *_pool("max_pool2d", (32, 192, 28, 28), (3, 1, 1), (_F32, "NCHW", False), (_F32, "NHWC", True)),
    *_pool(
        "avg_pool2d",
        (32, 64, 112, 112),
        (3, 2, 1),
        (_F32, "NCHW", True),
        (_F32, "NHWC", True),
        (_F64, "NHWC", False),
        (_BF16, "NCHW", False),
    ),
    *_pool("avg_pool2d", (32, 192, 28, 28), (3, 1, 1), (_F32, "NCHW", False)),
    *_pool("max_pool2d", (8, 64, 56, 56), (13, 1, 6), (_F32, "NCHW", True)),
    *_pool("max_pool2d", (8, 64, 56, 56), (31, 1, 15), (_F32, "NCHW", False)),
    *_pool("avg_pool2d", (8, 64, 56, 56), (31, 1, 15), (_F32, "NCHW", False)),
    *_pool("max_pool1d", (4, 1024, 4096), (2, 2, 0), (_F32, "NCL", True)),
    *_pool("max_pool1d", (4, 1024, 4096), (15, 15, 0), (_F32, "NCL", False)),
    *_pool("avg_pool1d", (4, 1024, 4096), (2, 2, 0), (_F32, "NCL", False)),
    *_pool("max_pool3d", (8, 32, 16, 56, 56), (3, 2, 0), (_F32, "NCDHW", True)),
    *_pool("avg_pool3d", (8, 32, 16, 56, 56), (2, 2, 0), (_F32, "NCDHW", False)),
    AdaptivePoolRow("adaptive_avg_pool2d", _F32, "NCHW", True, (32, 256, 56, 56), 7),
    AdaptivePoolRow("adaptive_max_pool2d", _F32, "NCHW", False, (32, 256, 56, 56), 7),
    AdaptivePoolRow("adaptive_avg_pool2d", _F32, "NCHW", True, (32, 256, 56, 56), 1),
]

_CONV: list[Row] = [
    *_conv((8, 32, 112, 112), 32, (3, 1, 1), (_F32, "NCHW", True), (_F32, "NHWC", False), g=32),
    *_conv((8, 144, 56, 56), 144, (3, 2, 1), (_F32, "NCHW", False), (_BF16, "NHWC", True), g=144),
    *_conv((8, 384, 14, 14), 384, (5, 1, 2), (_F32, "NCHW", False), g=384),
    *_conv(
        (8, 96, 56, 56),
        96,
        (7, 1, 3),
        (_F32, "NCHW", True),
        (_F32, "NHWC", True),
        (_F64, "NCHW", False),
        g=96,
    ),
    *_conv((8, 256, 14, 14), 256, (31, 1, 15), (_F32, "NCHW", False), g=256),
    *_conv((8, 128, 28, 28), 128, (3, 1, 1), (_F32, "NCHW", False), g=32),
    *_conv((8, 3, 224, 224), 64, (7, 2, 3), (_F32, "NCHW", True)),
    *_conv((8, 64, 56, 56), 64, (3, 1, 1), (_F32, "NCHW", True)),
    *_conv((8, 256, 14, 14), 256, (3, 1, 1), (_F32, "NHWC", True)),
    *_conv((8, 64, 56, 56), 256, (1, 1, 0), (_F32, "NCHW", True)),
    *_conv((8, 128, 28, 28), 128, (3, 1, 1), (_BF16, "NHWC", True), (_F64, "NCHW", False)),
    *_conv((64, 1, 28, 28), 6, (5, 1, 2), (_F32, "NCHW", True)),
    *_conv((4, 4096, 2048), 4096, (4, 1, 3), (_F32, "NCL", False), g=4096),
    *_conv((2, 32, 16, 56, 56), 64, (3, 1, 1), (_F32, "NCDHW", False)),
    *_conv((2, 32, 16, 56, 56), 32, (3, 1, 1), (_F32, "NCDHW", False), g=32),
    *_conv((8, 128, 28, 28), 64, (4, 2, 1), (_F32, "NCHW", False), op="conv_transpose2d"),
    *_conv((8, 128, 28, 28), 128, (3, 2, 1), (_F32, "NCHW", False), g=128, op="conv_transpose2d"),
    *_conv((8, 64, 28, 28), 64, (3, 1, 2), (_F32, "NCHW", False), d=2),
    *_blocks((8, 32, 112, 112), 32, (3, 1, 1), "NCHW", g=32),
    *_blocks((8, 32, 112, 112), 32, (3, 1, 1), "NHWC", g=32),
    *_blocks((8, 64, 56, 56), 256, (1, 1, 0), "NCHW"),
    *_blocks((8, 32, 112, 112), 64, (1, 1, 0), "NHWC"),
    *_blocks((8, 3, 224, 224), 32, (3, 2, 1), "NCHW"),
]

_RNN: list[Row] = [
    CellRow("lstm_cell", _F32, "", True, 1, 64),
    CellRow("gru_cell", _F32, "", True, 1, 64),
    CellRow("rnn_cell", _F32, "", True, 1, 64),
    CellRow("lstm_cell", _F32, "", True, 16, 128),
    CellRow("lstm_cell", _F32, "", True, 32, 512),
    CellRow("gru_cell", _F32, "", True, 64, 1024),
    CellRow("lstm_cell", _BF16, "", False, 32, 512),
    LayerRow("lstm", _F32, "", True, 100, 1, 128),
    LayerRow("gru", _F32, "", False, 100, 1, 128),
    LayerRow("rnn", _F32, "", False, 100, 1, 128),
    LayerRow("gru", _F32, "", True, 100, 16, 128),
    LayerRow("lstm", _F32, "", False, 100, 16, 128, twice=True),
    LayerRow("lstm", _F32, "", True, 100, 32, 512),
    LayerRow("lstm", _F32, "", False, 100, 32, 512, padded=True),
    LayerRow("lstm", _BF16, "", False, 100, 32, 512),
    LayerRow("gru", _F32, "", False, 100, 32, 512),
    LayerRow("lstm", _F32, "", False, 35, 20, 650, 2),
    LayerRow("gru", _F32, "", False, 35, 20, 650, 2),
    LayerRow("lstm", _F32, "", False, 200, 64, 256),
    LayerRow("gru", _F32, "", False, 200, 64, 256),
    LayerRow("rnn", _F32, "", True, 200, 64, 256),
    *(
        kind(op, _F32, "", False, 100, 16, 128)
        for kind in (VariantRow, PlainRow)
        for op in VARIANTS
    ),
    *(LengthsRow(op, _F32, "", False, 100, 32, 512) for op in ("lstm", "gru")),
]

# A GPU needs larger problems to be busy, and is asked for the dtypes that it is bought for.
_CUDA_BATCH = {"pool": 256, "conv": 128}
_CUDA_RNN: list[Row] = [
    CellRow(op, dtype, "", batch in (1, 64), batch, hidden)
    for op in ("lstm_cell", "gru_cell")
    for dtype in (_F32, _BF16)
    for batch, hidden in ((1, 64), (16, 256), (64, 512), (256, 1024))
] + [
    LayerRow(op, dtype, "", hidden == 512, steps, batch, hidden)
    for op in ("lstm", "gru", "rnn")
    for dtype in (_F32, _BF16)
    for steps, batch, hidden in ((128, 64, 256), (256, 32, 512), (1024, 16, 768), (128, 64, 1024))
]

FAMILIES: dict[str, list[Row]] = {"pool": _POOL, "conv": _CONV, "rnn": _RNN}


def rows(family: str, device: torch.device, full: bool = True) -> list[Row]:
    """The rows of one family on a device; `full=False` keeps the quick ones."""
    chosen = FAMILIES[family]
    if device.type == "cuda":
        if family == "rnn":
            chosen = _CUDA_RNN
        else:
            batch = _CUDA_BATCH[family]
            chosen = [row.with_batch(batch) for row in chosen if row.dtype != _F64]
    return [row for row in chosen if full or row.quick]
