"""Convolution, activation and pooling as one op.

On CPU a part of the map at a time is convolved into the cache and pooled from there; the unpooled
map is never written. Training with maxima keeps the pooled output and, per output, the place of its
maximum: what the activation does to a gradient is known from the maximum itself. With averages it
keeps the signs of the unpooled map, a bit for each element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weft import pool
from weft.autograd import Function, inside_transform, needs_grad
from weft.conv_ops import (
    ConvWindow,
    conv_activated,
    gradients,
    map_size,
    of_sum,
    save_operands,
)
from weft.pool_ops import (
    AvgPoolBackward,
    AvgWindow,
    MaxPoolBackward,
    MaxWindow,
    _channels_last,
    _max_outputs,
    _output_size,
)

_ops = torch.ops.weft


class Pooling(NamedTuple):
    """The pooling stage; one int per spatial axis."""

    kind: str  # "max" or "avg"
    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    @property
    def window(self) -> MaxWindow:
        return MaxWindow(self.size, self.stride, self.padding, (1,) * len(self.size), False)

    @property
    def average(self) -> AvgWindow:
        return AvgWindow(self.size, self.stride, self.padding, False, True, None)

    @property
    def overlaps(self) -> bool:
        return any(s < k for s, k in zip(self.stride, self.size, strict=True))


def pooling_of(
    rank: int, kind: str, size: pool.Size, stride: pool.Size, padding: pool.Size
) -> Pooling:
    """Sizes as torch's pooling layers take them, completed.

    Raises:
        RuntimeError: for a number of sizes that is neither 1 nor the rank.
    """
    op = f"{kind}_pool"
    return Pooling(
        kind,
        pool._per_axis(size, op, rank, "kernel_size"),
        pool._per_axis(stride, op, rank, "stride"),
        pool._per_axis(padding, op, rank, "padding"),
    )


@torch.library.register_fake("weft::conv_pooled")
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    slope: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pooling: str,
    *pool: Any,
) -> tuple[Tensor, Tensor]:
    *sizes, keep = pool
    window = Pooling(pooling, *sizes).window
    map_ = _ops.conv(input, weight, bias, stride, padding, dilation, groups)
    size = _output_size(map_.shape, window, window.dilation)
    output, places = _max_outputs(map_, size, window.kernel_size, keep and pooling == "max")
    if pooling == "max":
        return output, places
    kept: tuple[int, ...] = (0,)
    if keep and activation in _HAVE_SIGNS:
        kept = _sign_size(map_)
    return output, input.new_empty(kept, dtype=torch.uint8)


_HAVE_SIGNS = ("relu", "leaky_relu")


def _sign_size(map_: Tensor) -> tuple[int, int]:
    """Rows of a map that lie one after another, and the bytes of the signs of one."""
    positions = math.prod(map_.shape[2:])
    length = map_.shape[1] * map_.shape[-1] if _channels_last(map_, map_.dim() - 2) else positions
    return map_.numel() // max(length, 1), -(-length // 8)


@torch.library.register_fake("weft::conv_pooled_grad")
def _(grad: Tensor, signs: Tensor, size: Sequence[int], *rest: Any) -> Tensor:
    layout = torch.contiguous_format
    if rest[-1]:
        layout = torch.channels_last if len(size) == 4 else torch.channels_last_3d
    return torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=layout)


@torch.library.register_fake("weft::conv_pooled_backward")
def _(
    input: Tensor,
    grad: Tensor,
    weight: Tensor,
    kept: Tensor,
    output: Tensor | None,
    activation: str,
    slope: float,
    bias: bool,
    *stages: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    map_ = _ops.conv(input, weight, None, *stages[:4])
    return _ops.conv_backward(input, map_, weight, None, "none", 0.0, bias, *stages[:4])


def _kept_for_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    slope: float,
    window: ConvWindow,
    pooling: Pooling,
) -> tuple[Tensor, Tensor]:
    """The output, and the places or signs that backward needs."""
    return _ops.conv_pooled(input, weight, bias, activation, slope, *window, *pooling, True)


class ConvMaxPooled(Function):
    """y = maximum of activation(x ⋆ w + b) over windows; also returns the places."""

    compute = staticmethod(_kept_for_backward)

    @staticmethod
    def save(ctx: Any, args: tuple, outputs: tuple[Tensor, Tensor]) -> None:
        input, weight, _, ctx.activation, ctx.slope, ctx.window, ctx.pooling = args
        ctx.sizes = input.shape, weight.shape
        ctx.mark_non_differentiable(outputs[1])
        save_operands(ctx, input, weight, *outputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        input, weight, output, places = ctx.saved_tensors
        if _all_at_once(ctx, input, weight, output, grad):
            activated = None if ctx.activation == "none" else output
            return *_all_gradients(ctx, input, weight, grad, places, activated), *(None,) * 4
        grad = of_sum(grad, output, ctx.activation, ctx.slope)
        input_size, weight_size = ctx.sizes
        size = map_size(input_size, weight_size, ctx.window)
        last = _channels_last(output, len(size) - 2)
        grad = MaxPoolBackward.apply(grad, places, size, last, ctx.pooling.window)
        return *gradients(ctx, input, weight, grad), *(None,) * 4


class ConvAvgPooled(Function):
    """y = average of activation(x ⋆ w + b) over windows; also returns the signs of the map.

    A gradient that will be differentiated again is taken by way of the map, which is made anew.
    """

    compute = staticmethod(_kept_for_backward)

    @staticmethod
    def save(ctx: Any, args: tuple, outputs: tuple[Tensor, Tensor]) -> None:
        input, weight, bias, ctx.activation, ctx.slope, ctx.window, ctx.pooling = args
        ctx.sizes = input.shape, weight.shape
        ctx.last = _channels_last(outputs[0], input.dim() - 2)
        ctx.mark_non_differentiable(outputs[1])
        ctx.save_for_backward(input, weight, bias, outputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        input, weight, bias, signs = ctx.saved_tensors
        if _all_at_once(ctx, input, weight, bias, grad):
            return *_all_gradients(ctx, input, weight, grad, signs, None), *(None,) * 4
        activation, slope, window, pooling = ctx.activation, ctx.slope, ctx.window, ctx.pooling
        input_size, weight_size = ctx.sizes
        size = torch.Size(map_size(input_size, weight_size, window))
        if needs_grad(input, weight, bias, grad):
            map_ = conv_activated(input, weight, bias, activation, slope, window)
            grad = AvgPoolBackward.apply(grad, size, ctx.last, pooling.average)
            grad = of_sum(grad, map_, activation, slope)
        else:
            stages = (activation, slope, *pooling[1:], ctx.last)
            grad = _ops.conv_pooled_grad(grad, signs, size, *stages)
        return *gradients(ctx, input, weight, grad), *(None,) * 4


def _all_at_once(ctx: Any, *tensors: Tensor | None) -> bool:
    """Whether one op, which has no derivative, may give the gradients of input and weight."""
    return all(ctx.needs_input_grad[:2]) and not needs_grad(*tensors) and not inside_transform()


def _all_gradients(
    ctx: Any, input: Tensor, weight: Tensor, grad: Tensor, kept: Tensor, output: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Those of input, weight and bias, by way of the map's gradient or without it."""
    bias_needs = ctx.needs_input_grad[2]
    stages = (ctx.activation, ctx.slope, bias_needs, *ctx.window, *ctx.pooling)
    gx, gw, gb = _ops.conv_pooled_backward(input, grad, weight, kept, output, *stages)
    return gx, gw, gb if bias_needs else None


def conv_pooled(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    slope: float,
    window: ConvWindow,
    pooling: Pooling,
) -> Tensor:
    """The three stages on a batch, as one op where the gradient does not need the unpooled map."""
    arguments = (input, weight, bias, activation, slope)
    # Rules of vmap, and autocast's of 3-d pooling, are those of the stages.
    separate = inside_transform() or (len(pooling.size) == 3 and torch.is_autocast_enabled("cpu"))
    if not separate:
        if not needs_grad(input, weight, bias):
            return _ops.conv_pooled(*arguments, *window, *pooling, False)[0]
        # Where windows overlap, several gradients meet at a maximum: their sum comes first.
        if pooling.kind == "max" and (activation in ("none", "relu") or not pooling.overlaps):
            return ConvMaxPooled.apply(*arguments, window, pooling)[0]
        if pooling.kind == "avg" and activation in _HAVE_SIGNS:
            return ConvAvgPooled.apply(*arguments, window, pooling)[0]
    map_ = conv_activated(*arguments, window)
    if pooling.kind == "max":
        return pool._pooled_max(map_, pooling.window, False)
    return pool._pooled_avg(map_, pooling.average)
