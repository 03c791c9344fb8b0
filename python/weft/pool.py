"""Pooling: autograd Functions and the functional API.

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


class AdaptiveWindow(NamedTuple):
    """The windows of adaptive pooling: they divide each spatial axis among this many outputs."""

    output_size: tuple[int, ...]


def _per_axis(
    value: int | Sequence[int] | None, rank: int, op: str, argument: str
) -> tuple[int, ...]:
    """`value` with one int per axis; () for None."""
    if value is None:
        return ()
    if not isinstance(value, Sequence):
        return (value,) * rank
    if len(value) == 1:
        return (value[0],) * rank
    if len(value) != rank and (len(value) > 0 or argument != "stride"):
        raise RuntimeError(
            f"{op}{rank}d: {argument} must either be a single int, or a tuple of {rank} ints; "
            f"got {tuple(value)}"
        )
    return tuple(value)


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


# ---- autograd ------------------------------------------------------------------------------------


def _op(name: str, window: MaxWindow | AvgWindow | AdaptiveWindow) -> Any:
    """The op that takes windows of this kind."""
    return getattr(_ops, f"adaptive_{name}" if isinstance(window, AdaptiveWindow) else name)


class MaxPool(Function):
    """y = max over each window; also returns the places (uint8, or int32 for large windows)."""

    @staticmethod
    def compute(input: Tensor, window: MaxWindow | AdaptiveWindow) -> tuple[Tensor, Tensor]:
        return _op("max_pool", window)(input, *window, True)

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
        return _op("max_pool_backward", window)(grad, places, size, *window, channels_last)

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
        return _op("max_pool_pick", window)(input, places, *window)

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
        return _op("avg_pool", window)(input, *window)

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
        return _op("avg_pool_backward", window)(grad, size, *window, channels_last)

    @staticmethod
    def save(ctx: Any, args: tuple, output: Tensor) -> None:
        ctx.window = args[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return AvgPool.apply(grad, ctx.window), None, None, None


# ---- functional API ------------------------------------------------------------------------------
#
# One implementation for each of the four poolings; the functions of torch's names fix the rank.

_Size = int | Sequence[int]


def _autocast_argument(input: Tensor, rank: int) -> Tensor:
    """torch's autocast runs 3-d pooling in float32 on CPU."""
    if rank < 3 or input.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return input
    return input.float() if input.dtype in (torch.bfloat16, torch.float16) else input


def _pooled_max(
    input: Tensor, window: MaxWindow | AdaptiveWindow, return_indices: bool
) -> Tensor | tuple[Tensor, Tensor]:
    input = _autocast_argument(input, len(window[0]))
    if needs_grad(input):
        output, places = MaxPool.apply(input, window)
    else:
        output, places = _op("max_pool", window)(input, *window, return_indices)
    if not return_indices:
        return output
    return output, _op("max_pool_indices", window)(places, input.shape, *window)


def _pooled_avg(input: Tensor, window: AvgWindow | AdaptiveWindow) -> Tensor:
    input = _autocast_argument(input, len(window[0]))
    if needs_grad(input):
        return AvgPool.apply(input, window)
    return _op("avg_pool", window)(input, *window)


def _max_window(
    rank: int, kernel_size: _Size, stride: _Size | None, padding: _Size, dilation: _Size, ceil: bool
) -> MaxWindow:
    return MaxWindow(
        _per_axis(kernel_size, rank, "max_pool", "kernel_size"),
        _per_axis(stride, rank, "max_pool", "stride"),
        _per_axis(padding, rank, "max_pool", "padding"),
        _per_axis(dilation, rank, "max_pool", "dilation"),
        ceil,
    )


def _avg_window(
    rank: int,
    kernel_size: _Size,
    stride: _Size | None,
    padding: _Size,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> AvgWindow:
    return AvgWindow(
        _per_axis(kernel_size, rank, "avg_pool", "kernel_size"),
        _per_axis(stride, rank, "avg_pool", "stride"),
        _per_axis(padding, rank, "avg_pool", "padding"),
        ceil_mode,
        count_include_pad,
        divisor_override,
    )


def _adaptive_window(
    input: Tensor, output_size: int | Sequence[int | None] | None, rank: int, op: str
) -> AdaptiveWindow:
    """None in `output_size` stands for the input's extent."""
    if isinstance(output_size, Sequence):
        if len(output_size) != rank:
            raise RuntimeError(f"{op}{rank}d: output_size must be {rank} ints; got {output_size}")
        if input.dim() <= rank:
            raise ValueError(
                f"{op}{rank}d: Input dimension should be at least {rank + 1}, but got input of "
                f"size {list(input.shape)}"
            )
        sizes = tuple(output_size)
    elif output_size is None:
        raise TypeError(f"{op}{rank}d: output_size must be an int or a tuple of {rank}, got None")
    else:
        sizes = (output_size,) * rank
    if None in sizes:
        extents = input.shape[-rank:]
        sizes = tuple(e if s is None else s for s, e in zip(sizes, extents, strict=True))
    return AdaptiveWindow(sizes)  # type: ignore[arg-type]


def max_pool1d(
    input: Tensor,
    kernel_size: _Size,
    stride: _Size | None = None,
    padding: _Size = 0,
    dilation: _Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Maximum over windows: ``y[n,c,l] = max_{r} x[n, c, l·stride−pad+r·dil]``.

    Args as `torch.nn.functional.max_pool1d`.
        input: ``[N, C, L]`` or ``[C, L]``; float32, float64, bfloat16 or float16.
        return_indices: also return the int64 flat index (in ``L``) of each maximum; the first of
            equal ones, the last NaN.

    Raises:
        RuntimeError: for windows that do not fit and other invalid arguments, as torch.
    """
    window = _max_window(1, kernel_size, stride, padding, dilation, ceil_mode)
    return _pooled_max(input, window, return_indices)


def max_pool2d(
    input: Tensor,
    kernel_size: _Size,
    stride: _Size | None = None,
    padding: _Size = 0,
    dilation: _Size = 1,
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
    window = _max_window(2, kernel_size, stride, padding, dilation, ceil_mode)
    return _pooled_max(input, window, return_indices)


def max_pool3d(
    input: Tensor,
    kernel_size: _Size,
    stride: _Size | None = None,
    padding: _Size = 0,
    dilation: _Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Maximum over windows: ``y[n,c,d,h,w] = max_{q,r,s} x[n, c, d·stride−pad+q·dil, …]``.

    Args as `torch.nn.functional.max_pool3d`.
        input: ``[N, C, D, H, W]`` or ``[C, D, H, W]``; float32, float64, bfloat16 or float16;
            contiguous or channels-last, and the output has the same layout.
        return_indices: also return the int64 flat index (in ``D·H·W``) of each maximum; the first
            of equal ones, the last NaN.

    Raises:
        RuntimeError: for windows that do not fit and other invalid arguments, as torch.
    """
    window = _max_window(3, kernel_size, stride, padding, dilation, ceil_mode)
    return _pooled_max(input, window, return_indices)


def avg_pool1d(
    input: Tensor,
    kernel_size: _Size,
    stride: _Size | None = None,
    padding: _Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """Mean over windows: ``y[n,c,l] = (1/divisor) Σ_{r} x[n, c, l·stride−pad+r]``.

    Args as `torch.nn.functional.avg_pool1d`.
        input: ``[N, C, L]`` or ``[C, L]``; float32, float64, bfloat16 or float16.
        count_include_pad: divide by the number of window elements with those in the padding.

    Raises:
        RuntimeError: for windows that do not fit and other invalid arguments, as torch.
    """
    window = _avg_window(1, kernel_size, stride, padding, ceil_mode, count_include_pad, None)
    return _pooled_avg(input, window)


def avg_pool2d(
    input: Tensor,
    kernel_size: _Size,
    stride: _Size | None = None,
    padding: _Size = 0,
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
    window = _avg_window(
        2, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )
    return _pooled_avg(input, window)


def avg_pool3d(
    input: Tensor,
    kernel_size: _Size,
    stride: _Size | None = None,
    padding: _Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Mean over windows: ``y[n,c,d,h,w] = (1/divisor) Σ_{q,r,s} x[n, c, d·stride−pad+q, …]``.

    Args as `torch.nn.functional.avg_pool3d`.
        input: ``[N, C, D, H, W]`` or ``[C, D, H, W]``; float32, float64, bfloat16 or float16;
            contiguous or channels-last, and the output has the same layout.
        divisor_override: divide by this; else by the number of window elements, those in the
            padding included if `count_include_pad`.

    Raises:
        RuntimeError: for windows that do not fit and other invalid arguments, as torch.
    """
    window = _avg_window(
        3, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )
    return _pooled_avg(input, window)


def adaptive_max_pool1d(
    input: Tensor, output_size: _Size, return_indices: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Maximum over windows that divide the map: output o reads ``⌊o·in/out⌋ … ⌈(o+1)·in/out⌉ − 1``.

    Args as `torch.nn.functional.adaptive_max_pool1d`.
        input: ``[N, C, L]`` or ``[C, L]``; float32, float64, bfloat16 or float16.
        output_size: an int.
        return_indices: also return the int64 flat index (in ``L``) of each maximum; the first of
            equal ones, the last NaN.

    Raises:
        RuntimeError: for an empty map, a negative size and other invalid arguments, as torch.
    """
    window = _adaptive_window(input, output_size, 1, "adaptive_max_pool")
    return _pooled_max(input, window, return_indices)


def adaptive_max_pool2d(
    input: Tensor, output_size: int | Sequence[int | None] | None, return_indices: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Maximum over windows that divide the map: output o reads ``⌊o·in/out⌋ … ⌈(o+1)·in/out⌉ − 1``.

    Args as `torch.nn.functional.adaptive_max_pool2d`.
        input: ``[N, C, H, W]`` or ``[C, H, W]``; float32, float64, bfloat16 or float16; contiguous
            or channels-last, and the output has the same layout.
        output_size: an int or 2 of them; None keeps that axis's extent.
        return_indices: also return the int64 flat index (in ``H·W``) of each maximum; the first of
            equal ones, the last NaN.

    Raises:
        RuntimeError: for an empty map, a negative size and other invalid arguments, as torch.
    """
    window = _adaptive_window(input, output_size, 2, "adaptive_max_pool")
    return _pooled_max(input, window, return_indices)


def adaptive_max_pool3d(
    input: Tensor, output_size: int | Sequence[int | None] | None, return_indices: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Maximum over windows that divide the map: output o reads ``⌊o·in/out⌋ … ⌈(o+1)·in/out⌉ − 1``.

    Args as `torch.nn.functional.adaptive_max_pool3d`.
        input: ``[N, C, D, H, W]`` or ``[C, D, H, W]``; float32, float64, bfloat16 or float16;
            contiguous or channels-last, and the output has the same layout.
        output_size: an int or 3 of them; None keeps that axis's extent.
        return_indices: also return the int64 flat index (in ``D·H·W``) of each maximum; the first
            of equal ones, the last NaN.

    Raises:
        RuntimeError: for an empty map, a negative size and other invalid arguments, as torch.
    """
    window = _adaptive_window(input, output_size, 3, "adaptive_max_pool")
    return _pooled_max(input, window, return_indices)


def adaptive_avg_pool1d(input: Tensor, output_size: _Size) -> Tensor:
    """Mean over windows that divide the map: output o reads ``⌊o·in/out⌋ … ⌈(o+1)·in/out⌉ − 1``.

    Args as `torch.nn.functional.adaptive_avg_pool1d`.
        input: ``[N, C, L]`` or ``[C, L]``; float32, float64, bfloat16 or float16.
        output_size: an int.

    Raises:
        RuntimeError: for an empty map, a negative size and other invalid arguments, as torch.
    """
    window = _adaptive_window(input, output_size, 1, "adaptive_avg_pool")
    return _pooled_avg(input, window)


def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    """Mean over windows that divide the map: output o reads ``⌊o·in/out⌋ … ⌈(o+1)·in/out⌉ − 1``.

    Args as `torch.nn.functional.adaptive_avg_pool2d`.
        input: ``[N, C, H, W]`` or ``[C, H, W]``; float32, float64, bfloat16 or float16; contiguous
            or channels-last, and the output has the same layout.
        output_size: an int or 2 of them; None keeps that axis's extent.

    Raises:
        RuntimeError: for an empty map, a negative size and other invalid arguments, as torch.
    """
    window = _adaptive_window(input, output_size, 2, "adaptive_avg_pool")
    return _pooled_avg(input, window)


def adaptive_avg_pool3d(input: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    """Mean over windows that divide the map: output o reads ``⌊o·in/out⌋ … ⌈(o+1)·in/out⌉ − 1``.

    Args as `torch.nn.functional.adaptive_avg_pool3d`.
        input: ``[N, C, D, H, W]`` or ``[C, D, H, W]``; float32, float64, bfloat16 or float16;
            contiguous or channels-last, and the output has the same layout.
        output_size: an int or 3 of them; None keeps that axis's extent.

    Raises:
        RuntimeError: for an empty map, a negative size and other invalid arguments, as torch.
    """
    window = _adaptive_window(input, output_size, 3, "adaptive_avg_pool")
    return _pooled_avg(input, window)
