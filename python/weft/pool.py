"""Pooling: autograd Functions and the functional API.

Max pooling keeps one byte per output for backward (the place of the maximum inside its window) and
not its input. Both poolings are linear once the places are known, so the double backward of each is
its forward again: max pooling picks, average pooling averages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weft.autograd import Function, needs_grad

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


def _per_axis(value: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, Sequence):
        return (int(value[0]),) * rank if len(value) == 1 else tuple(value)
    return (value,) * rank


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


def _empty(like: Tensor, size: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An output of `like`'s layout, as the compiled ops choose it."""
    layout = torch.contiguous_format
    if like.dim() in (4, 5):
        layout = torch._prims_common.suggest_memory_format(like)
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def _place_dtype(kernel_size: Sequence[int]) -> torch.dtype:
    elements = 1
    for size in kernel_size:
        elements *= size
    return torch.uint8 if elements <= 256 else torch.int32


@torch.library.register_fake("weft::max_pool")
def _(input: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *window_args, keep_places = args
    window = MaxWindow(*window_args)
    size = _output_size(input.shape, window, window.dilation)
    dtype = _place_dtype(window.kernel_size)
    places = _empty(input, size, dtype) if keep_places else input.new_empty((0,), dtype=dtype)
    return _empty(input, size), places


@torch.library.register_fake("weft::max_pool_backward")
def _(grad: Tensor, places: Tensor, input_size: Sequence[int], *window: Any) -> Tensor:
    return _empty(places, input_size, grad.dtype)


@torch.library.register_fake("weft::max_pool_pick")
def _(input: Tensor, places: Tensor, *window: Any) -> Tensor:
    return _empty(places, places.shape, input.dtype)


@torch.library.register_fake("weft::max_pool_indices")
def _(places: Tensor, input_size: Sequence[int], *window: Any) -> Tensor:
    return _empty(places, places.shape, torch.int64)


@torch.library.register_fake("weft::avg_pool")
def _(input: Tensor, *window: Any) -> Tensor:
    dilation = (1,) * len(window[0])
    return _empty(input, _output_size(input.shape, AvgWindow(*window), dilation))


@torch.library.register_fake("weft::avg_pool_backward")
def _(grad: Tensor, input_size: Sequence[int], *window: Any) -> Tensor:
    return _empty(grad, input_size)


# ---- autograd ------------------------------------------------------------------------------------


class MaxPool(Function):
    """y = max over each window; also returns the places (uint8, or int32 for large windows)."""

    @staticmethod
    def compute(input: Tensor, window: MaxWindow) -> tuple[Tensor, Tensor]:
        return _ops.max_pool(input, *window, True)

    @staticmethod
    def save(ctx: Any, args: tuple, outputs: tuple[Tensor, Tensor]) -> None:
        input, ctx.window = args
        ctx.input_size = input.shape
        ctx.mark_non_differentiable(outputs[1])
        ctx.save_for_backward(outputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return MaxPoolBackward.apply(grad, places, ctx.input_size, ctx.window), None


class MaxPoolBackward(Function):
    """gx = Pᵀ gy, where P picks each window's place."""

    @staticmethod
    def compute(grad: Tensor, places: Tensor, input_size: torch.Size, window: MaxWindow) -> Tensor:
        return _ops.max_pool_backward(grad, places, input_size, *window)

    @staticmethod
    def save(ctx: Any, args: tuple, output: Tensor) -> None:
        _, places, _, ctx.window = args
        ctx.save_for_backward(places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        return MaxPoolPick.apply(grad, places, ctx.window), None, None, None


class MaxPoolPick(Function):
    """y = P x: the values at each window's place."""

    @staticmethod
    def compute(input: Tensor, places: Tensor, window: MaxWindow) -> Tensor:
        return _ops.max_pool_pick(input, places, *window)

    @staticmethod
    def save(ctx: Any, args: tuple, output: Tensor) -> None:
        input, places, ctx.window = args
        ctx.input_size = input.shape
        ctx.save_for_backward(places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return MaxPoolBackward.apply(grad, places, ctx.input_size, ctx.window), None, None


class AvgPool(Function):
    """y = A x: sum of each window / divisor."""

    @staticmethod
    def compute(input: Tensor, window: AvgWindow) -> Tensor:
        return _ops.avg_pool(input, *window)

    @staticmethod
    def save(ctx: Any, args: tuple, output: Tensor) -> None:
        input, ctx.window = args
        ctx.input_size = input.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return AvgPoolBackward.apply(grad, ctx.input_size, ctx.window), None


class AvgPoolBackward(Function):
    """gx = Aᵀ gy."""

    @staticmethod
    def compute(grad: Tensor, input_size: torch.Size, window: AvgWindow) -> Tensor:
        return _ops.avg_pool_backward(grad, input_size, *window)

    @staticmethod
    def save(ctx: Any, args: tuple, output: Tensor) -> None:
        ctx.window = args[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return AvgPool.apply(grad, ctx.window), None, None


# ---- functional API ------------------------------------------------------------------------------


def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Maximum over windows: ``y[n,c,h,w] = max_{r,s} x[n, c, h·stride−pad+r·dil, …]``.

    Args as `torch.nn.functional.max_pool2d`.
        input: ``[N, C, H, W]`` or ``[C, H, W]``; float32, float64, bfloat16 or float16; contiguous
            or channels-last, and the output has the same layout.
        return_indices: also return the int64 flat index (in ``H·W``) of each maximum; the first of
            equal ones, the last NaN.

    Raises:
        RuntimeError: for windows that do not fit and other invalid arguments, as torch.
    """
    window = MaxWindow(
        _per_axis(kernel_size, 2),
        _per_axis(stride, 2),
        _per_axis(padding, 2),
        _per_axis(dilation, 2),
        ceil_mode,
    )
    if needs_grad(input):
        output, places = MaxPool.apply(input, window)
    else:
        output, places = _ops.max_pool(input, *window, return_indices)
    if not return_indices:
        return output
    return output, _ops.max_pool_indices(places, input.shape, *window)


def avg_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Mean over windows: ``y[n,c,h,w] = (1/divisor) Σ_{r,s} x[n, c, h·stride−pad+r, …]``.

    Args as `torch.nn.functional.avg_pool2d`.
        input: ``[N, C, H, W]`` or ``[C, H, W]``; float32, float64, bfloat16 or float16; contiguous
            or channels-last, and the output has the same layout.
        divisor_override: divide by this; else by the number of window elements, those in the
            padding included if `count_include_pad`.

    Raises:
        RuntimeError: for windows that do not fit and other invalid arguments, as torch.
    """
    window = AvgWindow(
        _per_axis(kernel_size, 2),
        _per_axis(stride, 2),
        _per_axis(padding, 2),
        ceil_mode,
        count_include_pad,
        divisor_override,
    )
    if needs_grad(input):
        return AvgPool.apply(input, window)
    return _ops.avg_pool(input, *window)
