"""Pooling: windows as plain data, fake implementations, vmap rules, autograd Functions.

Max pooling keeps one byte per output for backward (the place of the maximum inside its window) and
not its input. Both poolings are linear once the places are known, so the double backward of each is
its forward again: max pooling picks, average pooling averages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weft.autograd import Function
from weft.batching import register_batch_rule

_ops = torch.ops.weft


class MaxWindow(NamedTuple):
    """The window arguments of max pooling, one int per spatial axis (stride may be empty)."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool


class AvgWindow(NamedTuple):
    """The window arguments of average pooling, one int per spatial axis (stride may be empty)."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    ceil_mode: bool
    count_include_pad: bool
    divisor_override: int | None


class AdaptiveWindow(NamedTuple):
    """The windows of adaptive pooling: they divide each spatial axis among this many outputs."""

    output_size: tuple[int, ...]


# ---- fake implementations ------------------------------------------------------------------------


def _output_size(
    input_size: Sequence[int], window: MaxWindow | AvgWindow, dilation: Sequence[int]
) -> list[int]:
    rank = len(window.kernel_size)
    stride = window.stride or window.kernel_size
    result = list(input_size)
    for i in range(rank):
        axis = len(result) - rank + i
        span = dilation[i] * (window.kernel_size[i] - 1) + 1
        spare = input_size[axis] + 2 * window.padding[i] - span
        extent = (spare + (stride[i] - 1 if window.ceil_mode else 0)) // stride[i] + 1
        if window.ceil_mode:
            starts_inside = (extent - 1) * stride[i] < input_size[axis] + window.padding[i]
            extent = extent if starts_inside else extent - 1
        result[axis] = extent
    return result


def _layout(t: Tensor, rank: int) -> torch.memory_format:
    """The layout of outputs made from `t`; unbatched tensors have no channels-last form."""
    if t.dim() != rank + 2 or rank == 1:
        return torch.contiguous_format
    return torch._prims_common.suggest_memory_format(t)


def _channels_last(t: Tensor, rank: int) -> bool:
    # What `_layout` says, at the cost that a step of a small model can bear.
    return rank > 1 and t.dim() == rank + 2 and not t.is_contiguous() and t.stride(1) == 1


def _empty_gradient(grad: Tensor, input_size: Sequence[int], channels_last: bool) -> Tensor:
    layout = torch.contiguous_format
    if channels_last:
        layout = torch.channels_last if len(input_size) == 4 else torch.channels_last_3d
    return torch.empty(input_size, dtype=grad.dtype, device=grad.device, memory_format=layout)


def _empty(like: Tensor, size: Sequence[int], rank: int, dtype: torch.dtype) -> Tensor:
    layout = _layout(like, rank)
    return torch.empty(size, dtype=dtype, device=like.device, memory_format=layout)


def _largest_window(extent: int, outputs: int) -> int:
    """The positions of the largest of the adaptive windows on one axis."""
    if outputs == 0:
        return 1
    rest = extent % outputs
    return extent // outputs + (0 if rest == 0 else 1 if outputs % rest == 0 else 2)


def _place_dtype(window_sizes: Sequence[int]) -> torch.dtype:
    return torch.uint8 if math.prod(window_sizes) <= 256 else torch.int32


def _max_outputs(
    input: Tensor, size: Sequence[int], window_sizes: Sequence[int], keep_places: bool
) -> tuple[Tensor, Tensor]:
    rank = len(window_sizes)
    dtype = _place_dtype(window_sizes)
    places = _empty(input, size, rank, dtype) if keep_places else input.new_empty(0, dtype=dtype)
    return _empty(input, size, rank, input.dtype), places


@torch.library.register_fake("weft::max_pool")
def _(input: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *window_args, keep_places = args
    window = MaxWindow(*window_args)
    size = _output_size(input.shape, window, window.dilation)
    return _max_outputs(input, size, window.kernel_size, keep_places)


@torch.library.register_fake("weft::adaptive_max_pool")
def _(input: Tensor, output_size: Sequence[int], keep_places: bool) -> tuple[Tensor, Tensor]:
    rank = len(output_size)
    windows = [_largest_window(i, o) for i, o in zip(input.shape[-rank:], output_size, strict=True)]
    return _max_outputs(input, (*input.shape[:-rank], *output_size), windows, keep_places)


@torch.library.register_fake("weft::max_pool_backward")
@torch.library.register_fake("weft::adaptive_max_pool_backward")
def _(grad: Tensor, places: Tensor, input_size: Sequence[int], *args: Any) -> Tensor:
    return _empty_gradient(grad, input_size, args[-1])


@torch.library.register_fake("weft::max_pool_pick")
@torch.library.register_fake("weft::adaptive_max_pool_pick")
def _(input: Tensor, places: Tensor, *window: Any) -> Tensor:
    return _empty(places, places.shape, len(window[0]), input.dtype)


@torch.library.register_fake("weft::max_pool_indices")
@torch.library.register_fake("weft::adaptive_max_pool_indices")
def _(places: Tensor, input_size: Sequence[int], *window: Any) -> Tensor:
    return _empty(places, places.shape, len(window[0]), torch.int64)


@torch.library.register_fake("weft::avg_pool")
def _(input: Tensor, *window: Any) -> Tensor:
    rank = len(window[0])
    size = _output_size(input.shape, AvgWindow(*window), (1,) * rank)
    return _empty(input, size, rank, input.dtype)


@torch.library.register_fake("weft::adaptive_avg_pool")
def _(input: Tensor, output_size: Sequence[int]) -> Tensor:
    rank = len(output_size)
    return _empty(input, (*input.shape[:-rank], *output_size), rank, input.dtype)


@torch.library.register_fake("weft::avg_pool_backward")
@torch.library.register_fake("weft::adaptive_avg_pool_backward")
def _(grad: Tensor, input_size: Sequence[int], *args: Any) -> Tensor:
    return _empty_gradient(grad, input_size, args[-1])


# ---- vmap ----------------------------------------------------------------------------------------

# The place of the argument that has an int per spatial axis, and of the one that is a size.
_ARGUMENTS = {
    "max_pool": (1, None),
    "max_pool_backward": (3, 2),
    "max_pool_pick": (2, None),
    "max_pool_indices": (2, 1),
    "avg_pool": (1, None),
    "avg_pool_backward": (2, 1),
}


def _register_batch_rules() -> None:
    for name, (per_axis, size) in _ARGUMENTS.items():
        for op in (f"weft::{name}", f"weft::adaptive_{name}"):
            register_batch_rule(op, lambda *args, at=per_axis: len(args[at]) + 1, size)


_register_batch_rules()


# ---- autograd ------------------------------------------------------------------------------------


def pool_op(name: str, window: MaxWindow | AvgWindow | AdaptiveWindow) -> Any:
    """The op that takes windows of this kind."""
    return getattr(_ops, f"adaptive_{name}" if isinstance(window, AdaptiveWindow) else name)


class MaxPool(Function):
    """y = max over each window; also returns the places (uint8, or int32 for large windows)."""

    @staticmethod
    def compute(input: Tensor, window: MaxWindow | AdaptiveWindow) -> tuple[Tensor, Tensor]:
        return pool_op("max_pool", window)(input, *window, True)

    @staticmethod
    def save(ctx: Any, args: tuple, outputs: tuple[Tensor, Tensor]) -> None:
        input, ctx.window = args
        ctx.layout = input.shape, _channels_last(input, len(ctx.window[0]))
        ctx.mark_non_differentiable(outputs[1])
        ctx.save_for_backward(outputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return MaxPoolBackward.apply(grad, places, *ctx.layout, ctx.window), None


class MaxPoolBackward(Function):
    """gx = Pᵀ gy, where P picks each window's place."""

    @staticmethod
    def compute(
        grad: Tensor,
        places: Tensor,
        size: torch.Size,
        channels_last: bool,
        window: MaxWindow | AdaptiveWindow,
    ) -> Tensor:
        return pool_op("max_pool_backward", window)(grad, places, size, *window, channels_last)

    @staticmethod
    def save(ctx: Any, args: tuple, output: Tensor) -> None:
        _, places, _, _, ctx.window = args
        ctx.save_for_backward(places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (places,) = ctx.saved_tensors
        return MaxPoolPick.apply(grad, places, ctx.window), None, None, None, None


class MaxPoolPick(Function):
    """y = P x: the values at each window's place."""

    @staticmethod
    def compute(input: Tensor, places: Tensor, window: MaxWindow | AdaptiveWindow) -> Tensor:
        return pool_op("max_pool_pick", window)(input, places, *window)

    @staticmethod
    def save(ctx: Any, args: tuple, output: Tensor) -> None:
        input, places, ctx.window = args
        ctx.layout = input.shape, _channels_last(input, len(ctx.window[0]))
        ctx.save_for_backward(places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return MaxPoolBackward.apply(grad, places, *ctx.layout, ctx.window), None, None


class AvgPool(Function):
    """y = A x: sum of each window / divisor."""

    @staticmethod
    def compute(input: Tensor, window: AvgWindow | AdaptiveWindow) -> Tensor:
        return pool_op("avg_pool", window)(input, *window)

    @staticmethod
    def save(ctx: Any, args: tuple, output: Tensor) -> None:
        input, ctx.window = args
        ctx.layout = input.shape, _channels_last(input, len(ctx.window[0]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return AvgPoolBackward.apply(grad, *ctx.layout, ctx.window), None


class AvgPoolBackward(Function):
    """gx = Aᵀ gy."""

    @staticmethod
    def compute(
        grad: Tensor, size: torch.Size, channels_last: bool, window: AvgWindow | AdaptiveWindow
    ) -> Tensor:
        return pool_op("avg_pool_backward", window)(grad, size, *window, channels_last)

    @staticmethod
    def save(ctx: Any, args: tuple, output: Tensor) -> None:
        ctx.window = args[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return AvgPool.apply(grad, ctx.window), None, None, None
