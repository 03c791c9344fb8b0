"""Pooling: the functional API.

The functions of torch's names have torch's signatures and semantics, NaN, infinities and ties
included. One implementation for each of the four poolings; the names fix the rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, cast, overload

import torch
from torch import Tensor

from weft import _C
from weft.autograd import eagerly, needs_grad
from weft.pool_ops import AdaptiveWindow, AvgPool, AvgWindow, MaxPool, MaxWindow, pool_op

Size = int | Sequence[int]
MaxOutput = Tensor | tuple[Tensor, Tensor]
Mode = Literal["max", "mean"]


def _per_axis(value: Size | None, op: str, rank: int, argument: str) -> tuple[int, ...]:
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


def _autocast_argument(input: Tensor, rank: int) -> Tensor:
    """torch's autocast runs 3-d pooling in float32 on CPU."""
    if rank < 3 or input.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return input
    return input.float() if input.dtype in (torch.bfloat16, torch.float16) else input


@overload
def _pooled_max(
    input: Tensor, window: MaxWindow | AdaptiveWindow, return_indices: Literal[False]
) -> Tensor: ...
@overload
def _pooled_max(
    input: Tensor, window: MaxWindow | AdaptiveWindow, return_indices: bool
) -> MaxOutput: ...
def _pooled_max(
    input: Tensor, window: MaxWindow | AdaptiveWindow, return_indices: bool
) -> MaxOutput:
    input = _autocast_argument(input, len(window[0]))
    if needs_grad(input):
        output, places = MaxPool.apply(input, window)
    else:
        output, places = pool_op("max_pool", window)(input, *window, return_indices)
    if not return_indices:
        return output
    return output, pool_op("max_pool_indices", window)(places, input.shape, *window)


def _pooled_avg(input: Tensor, window: AvgWindow | AdaptiveWindow) -> Tensor:
    input = _autocast_argument(input, len(window[0]))
    if needs_grad(input):
        return AvgPool.apply(input, window)
    return pool_op("avg_pool", window)(input, *window)


def _max_pool(
    rank: int,
    input: Tensor,
    kernel_size: Size,
    stride: Size | None,
    padding: Size,
    dilation: Size,
    ceil_mode: bool,
    return_indices: bool,
) -> MaxOutput:
    if not return_indices:
        found = eagerly(_C.max_pool, input, rank, kernel_size, stride, padding, dilation, ceil_mode)
        if found is not None:
            return found
    window = MaxWindow(
        _per_axis(kernel_size, "max_pool", rank, "kernel_size"),
        _per_axis(stride, "max_pool", rank, "stride"),
        _per_axis(padding, "max_pool", rank, "padding"),
        _per_axis(dilation, "max_pool", rank, "dilation"),
        ceil_mode,
    )
    return _pooled_max(input, window, return_indices)


def _avg_pool(
    rank: int,
    input: Tensor,
    kernel_size: Size,
    stride: Size | None,
    padding: Size,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None = None,
) -> Tensor:
    found = eagerly(
        _C.avg_pool,
        input,
        rank,
        kernel_size,
        stride,
        padding,
        ceil_mode,
        count_include_pad,
        divisor_override,
    )
    if found is not None:
        return found
    window = AvgWindow(
        _per_axis(kernel_size, "avg_pool", rank, "kernel_size"),
        _per_axis(stride, "avg_pool", rank, "stride"),
        _per_axis(padding, "avg_pool", rank, "padding"),
        ceil_mode,
        count_include_pad,
        divisor_override,
    )
    return _pooled_avg(input, window)


def _adaptive_window(
    rank: int, input: Tensor, output_size: int | Sequence[int | None] | None, op: str
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


def _adaptive_max(
    rank: int,
    input: Tensor,
    output_size: int | Sequence[int | None] | None,
    return_indices: bool,
) -> MaxOutput:
    window = _adaptive_window(rank, input, output_size, "adaptive_max_pool")
    if not return_indices:
        found = eagerly(_C.adaptive_max_pool, input, window.output_size)
        if found is not None:
            return found
    return _pooled_max(input, window, return_indices)


def _adaptive_avg(
    rank: int, input: Tensor, output_size: int | Sequence[int | None] | None
) -> Tensor:
    window = _adaptive_window(rank, input, output_size, "adaptive_avg_pool")
    found = eagerly(_C.adaptive_avg_pool, input, window.output_size)
    return _pooled_avg(input, window) if found is None else found


# ---- maximum -------------------------------------------------------------------------------------


def max_pool1d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> MaxOutput:
    """Maximum over windows of ``[N, C, L]`` or ``[C, L]``: ``y[l] = max_r x[l·stride−pad+r·dil]``.

    As `torch.nn.functional.max_pool1d`, in float32, float64, bfloat16 and float16. With
    `return_indices` also the int64 index in ``L`` of each maximum: the first of equal ones, the
    last NaN. Raises torch's RuntimeError for windows that do not fit.
    """
    return _max_pool(1, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> MaxOutput:
    """Maximum over windows of ``[N, C, H, W]`` or ``[C, H, W]``, contiguous or channels-last.

    As `torch.nn.functional.max_pool2d`, in float32, float64, bfloat16 and float16; the output has
    the input's layout. With `return_indices` also the int64 flat index in ``H·W`` of each maximum:
    the first of equal ones, the last NaN. Raises torch's RuntimeError for windows that do not fit.
    """
    return _max_pool(2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool3d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> MaxOutput:
    """Maximum over windows of ``[N, C, D, H, W]`` or ``[C, D, H, W]``.

    As `torch.nn.functional.max_pool3d`, in float32, float64, bfloat16 and float16; the output has
    the input's layout, contiguous or channels-last. With `return_indices` also the int64 flat index
    in ``D·H·W`` of each maximum: the first of equal ones, the last NaN. Raises torch's RuntimeError
    for windows that do not fit.
    """
    return _max_pool(3, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


# ---- mean ----------------------------------------------------------------------------------------


def avg_pool1d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """Mean over windows of ``[N, C, L]`` or ``[C, L]``: ``y[l] = Σ_r x[l·stride−pad+r] / divisor``.

    As `torch.nn.functional.avg_pool1d`, in float32, float64, bfloat16 and float16. Raises torch's
    RuntimeError for windows that do not fit.
    """
    return _avg_pool(1, input, kernel_size, stride, padding, ceil_mode, count_include_pad)


def avg_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Mean over windows of ``[N, C, H, W]`` or ``[C, H, W]``, contiguous or channels-last.

    As `torch.nn.functional.avg_pool2d`, in float32, float64, bfloat16 and float16; the output has
    the input's layout. Raises torch's RuntimeError for windows that do not fit and a divisor of 0.
    """
    return _avg_pool(
        2, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )


def avg_pool3d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Mean over windows of ``[N, C, D, H, W]`` or ``[C, D, H, W]``, contiguous or channels-last.

    As `torch.nn.functional.avg_pool3d`, in float32, float64, bfloat16 and float16; the output has
    the input's layout. Raises torch's RuntimeError for windows that do not fit and a divisor of 0.
    """
    return _avg_pool(
        3, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )


# ---- windows that divide the map: output o reads ⌊o·in/out⌋ … ⌈(o+1)·in/out⌉ − 1 of an axis ------


def adaptive_max_pool1d(
    input: Tensor, output_size: Size, return_indices: bool = False
) -> MaxOutput:
    """Maximum over windows that divide ``[N, C, L]`` or ``[C, L]`` among `output_size` outputs.

    As `torch.nn.functional.adaptive_max_pool1d`: output o reads ``⌊o·L/out⌋ … ⌈(o+1)·L/out⌉ − 1``.
    Raises torch's RuntimeError for an empty map and a negative size.
    """
    return _adaptive_max(1, input, output_size, return_indices)


def adaptive_max_pool2d(
    input: Tensor, output_size: int | Sequence[int | None] | None, return_indices: bool = False
) -> MaxOutput:
    """Maximum over windows that divide ``[N, C, H, W]`` or ``[C, H, W]`` among `output_size`.

    As `torch.nn.functional.adaptive_max_pool2d`: output o reads ``⌊o·H/out⌋ … ⌈(o+1)·H/out⌉ − 1``,
    and likewise along W; a size of None keeps that axis's extent. Raises torch's RuntimeError for
    an empty map and a negative size.
    """
    return _adaptive_max(2, input, output_size, return_indices)


def adaptive_max_pool3d(
    input: Tensor, output_size: int | Sequence[int | None] | None, return_indices: bool = False
) -> MaxOutput:
    """Maximum over windows that divide ``[N, C, D, H, W]`` or ``[C, D, H, W]`` among `output_size`.

    As `torch.nn.functional.adaptive_max_pool3d`, with windows as `adaptive_max_pool2d`'s. Raises
    torch's RuntimeError for an empty map and a negative size.
    """
    return _adaptive_max(3, input, output_size, return_indices)


def adaptive_avg_pool1d(input: Tensor, output_size: Size) -> Tensor:
    """Mean over windows that divide ``[N, C, L]`` or ``[C, L]`` among `output_size` outputs.

    As `torch.nn.functional.adaptive_avg_pool1d`: output o reads ``⌊o·L/out⌋ … ⌈(o+1)·L/out⌉ − 1``.
    Raises torch's RuntimeError for an empty map and a negative size.
    """
    return _adaptive_avg(1, input, output_size)


def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    """Mean over windows that divide ``[N, C, H, W]`` or ``[C, H, W]`` among `output_size`.

    As `torch.nn.functional.adaptive_avg_pool2d`: output o reads ``⌊o·H/out⌋ … ⌈(o+1)·H/out⌉ − 1``,
    and likewise along W; a size of None keeps that axis's extent. Raises torch's RuntimeError for
    an empty map and a negative size.
    """
    return _adaptive_avg(2, input, output_size)


def adaptive_avg_pool3d(input: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    """Mean over windows that divide ``[N, C, D, H, W]`` or ``[C, D, H, W]`` among `output_size`.

    As `torch.nn.functional.adaptive_avg_pool3d`, with windows as `adaptive_avg_pool2d`'s. Raises
    torch's RuntimeError for an empty map and a negative size.
    """
    return _adaptive_avg(3, input, output_size)


# ---- further window walks ------------------------------------------------------------------------


def channel_pool(
    input: Tensor,
    kernel_size: int,
    mode: Mode = "max",
    stride: int | None = None,
    ceil_mode: bool = False,
    dim: int = 1,
) -> Tensor:
    """Pools over groups of consecutive channels: ``y[n,k,…] = max_r x[n, k·stride+r, …]``.

    The other axes keep their extents. A walk of the window along the channel axis where it lies in
    memory: nothing is copied, be the input contiguous or channels-last.

    Args:
        input: of any shape, channels on axis `dim`; float32, float64, bfloat16 or float16.
        kernel_size: channels in a group.
        mode: "max" or "mean" of each group.
        stride: from group to group; default `kernel_size`.
        ceil_mode: with a last, smaller group where the channels do not divide; else they are left
            out.
        dim: the channel axis; 0 for unbatched maps, -1 for features.

    Raises:
        RuntimeError: if a group is larger than the channels, and for a stride of 0.
        ValueError: for another mode.
    """
    if mode not in ("max", "mean"):
        raise ValueError(f"channel_pool: mode must be 'max' or 'mean', got {mode!r}")
    moved = input.movedim(dim, -1)
    channels = moved.shape[-1]
    if not 1 <= kernel_size <= channels:
        raise RuntimeError(
            f"channel_pool: kernel_size must be between 1 and the {channels} channels on axis "
            f"{dim} of input of size {list(input.shape)}, got {kernel_size}"
        )
    stride = kernel_size if stride is None else stride
    if moved.is_contiguous():  # the channels of a position lie side by side
        touching = stride == kernel_size and channels % kernel_size == 0
        # Groups that touch run on from position to position of a map's row.
        row = moved.shape[-2] * channels if touching and moved.dim() > 2 else channels
        rows = moved.reshape(moved.numel() // max(row, 1), 1, row)
        y = _pooled_groups(1, rows, kernel_size, stride, mode, ceil_mode)
        outputs = y.shape[-1] * channels // row
        return y.reshape(*moved.shape[:-1], outputs).movedim(-1, dim)
    axis = dim % input.dim()
    before, behind = input.shape[:axis], input.shape[axis + 1 :]
    planes = input.reshape(math.prod(before), 1, channels, math.prod(behind))
    y = _pooled_groups(2, planes, (kernel_size, 1), (stride, 1), mode, ceil_mode)
    return y.reshape(*before, y.shape[2], *behind)


def _pooled_groups(
    rank: int, input: Tensor, kernel_size: Size, stride: Size, mode: str, ceil_mode: bool
) -> Tensor:
    if mode == "mean":
        return _avg_pool(rank, input, kernel_size, stride, 0, ceil_mode, True)
    return cast(Tensor, _max_pool(rank, input, kernel_size, stride, 0, 1, ceil_mode, False))


def weighted_avg_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """LeNet-5's subsampling: ``y[n,c,h,w] = weight[c] · mean of the window + bias[c]``.

    LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998, section II.B, where
    the window's sum is weighted: his coefficient is `weight` over the window's elements.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``; windows as `avg_pool2d`.
        weight: ``[C]``, of the input's dtype.
        bias: ``[C]`` or None.

    Raises:
        RuntimeError: for windows that do not fit, and parameters of another size or dtype.
    """
    if torch.is_autocast_enabled(input.device.type):  # the layer before gave a half type
        weight = weight.to(input.dtype)
        bias = None if bias is None else bias.to(input.dtype)
    channels = input.shape[-3] if input.dim() >= 3 else 0
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if parameter.shape != (channels,) or parameter.dtype != input.dtype:
            raise RuntimeError(
                f"weighted_avg_pool2d: {name} must be {input.dtype} [{channels}], one for each "
                f"channel of input of size {list(input.shape)}, got {parameter.dtype} "
                f"{list(parameter.shape)}"
            )
    mean = avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad)
    factor = weight[:, None, None]
    return mean * factor if bias is None else torch.addcmul(bias[:, None, None], mean, factor)
