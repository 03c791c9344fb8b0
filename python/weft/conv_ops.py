"""The ops of convolution: fake implementations, and how they become differentiable.

A transposed convolution is the dgrad of a convolution with the same weights, whose input it
computes.

fprop, dgrad and wgrad are closed under differentiation. Each is linear in both of its arguments, so
every gradient of every order is one of the three again, with roles exchanged:

    y  = fprop(x, w)        x ← dgrad(gy, w)      w  ← wgrad(x, gy)
    gx = dgrad(gy, w)       gy ← fprop(ggx, w)    w  ← wgrad(ggx, gy)
    gw = wgrad(x, gy)       x ← dgrad(gy, ggw)    gy ← fprop(x, ggw)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weft import _C
from weft import conv_vmap as conv_vmap  # registers the rules of vmap
from weft.autograd import Function, eagerly, inside_transform, needs_grad

_ops = torch.ops.weft


class ConvWindow(NamedTuple):
    """The window arguments of a convolution, one int per spatial axis.

    ``padding`` may also hold twice as many: all leading ones, then all trailing ones, which may be
    negative: the window then leaves positions at the end unread.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def map_size(input: Sequence[int], weight: Sequence[int], window: ConvWindow) -> list[int]:
    """The size of y = x ⋆ w; no channels in give no channels out."""
    rank = len(window.stride)
    size = [input[0], weight[0] if input[1] else 0]
    for i in range(rank):
        padded = input[2 + i] + window.padding[i] + window.padding[i - rank]
        span = window.dilation[i] * (weight[2 + i] - 1) + 1
        size.append((padded - span) // window.stride[i] + 1)
    return size


# ---- fake implementations ------------------------------------------------------------------------


def _empty(first: Tensor, second: Tensor, size: Sequence[int]) -> Tensor:
    """An output in the layout that the compiled ops choose: channels-last where an operand is."""
    layout = torch.contiguous_format
    for operand in (first, second):
        suggested = torch._prims_common.suggest_memory_format(operand)
        if operand.dim() >= 4 and suggested != torch.contiguous_format:
            layout = suggested
            break
    return torch.empty(size, dtype=first.dtype, device=first.device, memory_format=layout)


@torch.library.register_fake("weft::conv")
def _(input: Tensor, weight: Tensor, bias: Tensor | None, *window_args: Any) -> Tensor:
    return _empty(input, weight, map_size(input.shape, weight.shape, ConvWindow(*window_args)))


@torch.library.register_fake("weft::conv_activated")
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    slope: float,
    *window: Any,
) -> Tensor:
    return _ops.conv(input, weight, bias, *window)


@torch.library.register_fake("weft::conv_dgrad")
def _(
    grad: Tensor, weight: Tensor, bias: Tensor | None, input_size: Sequence[int], *window: Any
) -> Tensor:
    return _empty(grad, weight, input_size)


@torch.library.register_fake("weft::conv_wgrad")
def _(input: Tensor, grad: Tensor, weight_size: Sequence[int], *window: Any) -> Tensor:
    return _empty(input, grad, weight_size)


@torch.library.register_fake("weft::conv_bias_grad")
def _(grad: Tensor) -> Tensor:
    return grad.new_empty((grad.shape[1],))


@torch.library.register_fake("weft::conv_backward")
def _(
    input: Tensor,
    grad: Tensor,
    weight: Tensor,
    output: Tensor | None,
    activation: str,
    slope: float,
    bias: bool,
    *window: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _empty(grad, weight, input.shape),
        _empty(input, grad, weight.shape),
        grad.new_empty((weight.shape[0] if bias else 0,)),
    )


# ---- autograd ------------------------------------------------------------------------------------


def save_operands(ctx: Any, first: Tensor, second: Tensor, *more: Tensor) -> None:
    """Keeps each operand where the other's gradient is asked for."""
    first_needs, second_needs, *_ = ctx.needs_input_grad
    ctx.save_for_backward(first if second_needs else None, second if first_needs else None, *more)


class Conv(Function):
    """y = x ⋆ w + b."""

    @staticmethod
    def compute(input: Tensor, weight: Tensor, bias: Tensor | None, window: ConvWindow) -> Tensor:
        return _ops.conv(input, weight, bias, *window)

    @staticmethod
    def save(ctx: Any, args: tuple, output: Tensor) -> None:
        input, weight, _, ctx.window = args
        ctx.sizes = input.shape, weight.shape
        save_operands(ctx, input, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        return *gradients(ctx, input, weight, grad), None


class ConvActivated(Function):
    """y = activation(x ⋆ w + b), which backward undoes from y alone."""

    @staticmethod
    def compute(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        slope: float,
        window: ConvWindow,
    ) -> Tensor:
        return _ops.conv_activated(input, weight, bias, activation, slope, *window)

    @staticmethod
    def save(ctx: Any, args: tuple, output: Tensor) -> None:
        input, weight, _, ctx.activation, ctx.slope, ctx.window = args
        ctx.sizes = input.shape, weight.shape
        save_operands(ctx, input, weight, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, output = ctx.saved_tensors
        found = gradients(ctx, input, weight, grad, output, ctx.activation, ctx.slope)
        return *found, None, None, None


def gradients(
    ctx: Any,
    input: Tensor,
    weight: Tensor,
    grad: Tensor,
    output: Tensor | None = None,
    activation: str = "none",
    slope: float = 0.0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of input, weight and bias that `ctx` needs, of y = activation(x ⋆ w + b).

    One op, which has no derivative, gives them all where nothing differentiates them again.
    """
    input_size, weight_size = ctx.sizes
    input_needs, weight_needs, bias_needs, *_ = ctx.needs_input_grad
    last = not needs_grad(input, weight, output, grad) and not inside_transform()
    if last and input_needs and weight_needs:
        gx, gw, gb = _ops.conv_backward(
            input, grad, weight, output, activation, slope, bias_needs, *ctx.window
        )
        return gx, gw, gb if bias_needs else None
    if output is not None:
        grad = of_sum(grad, output, activation, slope)
    return (
        conv_dgrad(grad, weight, None, input_size, ctx.window) if input_needs else None,
        conv_wgrad(input, grad, weight_size, ctx.window) if weight_needs else None,
        _of_bias(grad, weight_size) if bias_needs else None,
    )


def _of_bias(grad: Tensor, weight_size: torch.Size) -> Tensor:
    """The bias's gradient; a convolution of no channels makes none, and leaves its bias alone."""
    return conv_bias_grad(grad) if weight_size[1] else grad.new_zeros(weight_size[0])


def of_sum(grad: Tensor, output: Tensor, activation: str, slope: float) -> Tensor:
    """The gradient of the sum that the activation made `output` of."""
    match activation:
        case "relu":
            return torch.ops.aten.threshold_backward(grad, output, 0)
        case "leaky_relu":
            return torch.ops.aten.leaky_relu_backward(grad, output, slope, True)
        case "tanh":
            return torch.ops.aten.tanh_backward(grad, output)
        case "sigmoid":
            return torch.ops.aten.sigmoid_backward(grad, output)
    return grad


class ConvDgrad(Function):
    """gx + b: for each input, the sum of gy · w over the windows that hold it, and its bias."""

    @staticmethod
    def compute(
        grad: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        input_size: torch.Size,
        window: ConvWindow,
    ) -> Tensor:
        return _ops.conv_dgrad(grad, weight, bias, input_size, *window)

    @staticmethod
    def save(ctx: Any, args: tuple, output: Tensor) -> None:
        grad, weight, _, _, ctx.window = args
        ctx.weight_size = weight.shape
        save_operands(ctx, grad, weight)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        grad, weight = ctx.saved_tensors
        grad_needs, weight_needs, bias_needs, *_ = ctx.needs_input_grad
        return (
            conv(cotangent, weight, None, ctx.window) if grad_needs else None,
            conv_wgrad(cotangent, grad, ctx.weight_size, ctx.window) if weight_needs else None,
            conv_bias_grad(cotangent) if bias_needs else None,
            None,
            None,
        )


class ConvWgrad(Function):
    """gw: for each weight, the sum of x · gy over images and positions."""

    @staticmethod
    def compute(input: Tensor, grad: Tensor, weight_size: torch.Size, window: ConvWindow) -> Tensor:
        return _ops.conv_wgrad(input, grad, weight_size, *window)

    @staticmethod
    def save(ctx: Any, args: tuple, output: Tensor) -> None:
        input, grad, _, ctx.window = args
        ctx.input_size = input.shape
        save_operands(ctx, input, grad)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        input, grad = ctx.saved_tensors
        input_needs, grad_needs, *_ = ctx.needs_input_grad
        return (
            conv_dgrad(grad, cotangent, None, ctx.input_size, ctx.window) if input_needs else None,
            conv(input, cotangent, None, ctx.window) if grad_needs else None,
            None,
            None,
        )


class ConvBiasGrad(Function):
    """gb: for each channel, the sum of gy over images and positions."""

    @staticmethod
    def compute(grad: Tensor) -> Tensor:
        return _ops.conv_bias_grad(grad)

    @staticmethod
    def save(ctx: Any, args: tuple, output: Tensor) -> None:
        ctx.grad_size = args[0].shape

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        per_channel = (-1,) + (1,) * (len(ctx.grad_size) - 2)
        return cotangent.reshape(per_channel).expand(ctx.grad_size)


# Each of the four as a differentiable function that pays for autograd only where it is asked for.


def conv(input: Tensor, weight: Tensor, bias: Tensor | None, window: ConvWindow) -> Tensor:
    found = eagerly(_C.conv, input, weight, bias, *window)
    if found is not None:
        return found
    if needs_grad(input, weight, bias):
        return Conv.apply(input, weight, bias, window)
    return _ops.conv(input, weight, bias, *window)


def conv_activated(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    slope: float,
    window: ConvWindow,
) -> Tensor:
    if activation == "none":  # whose backward needs no output
        return conv(input, weight, bias, window)
    found = eagerly(_C.conv_activated, input, weight, bias, activation, slope, *window)
    if found is not None:
        return found
    if needs_grad(input, weight, bias):
        return ConvActivated.apply(input, weight, bias, activation, slope, window)
    return _ops.conv_activated(input, weight, bias, activation, slope, *window)


def conv_dgrad(
    grad: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_size: Sequence[int],
    window: ConvWindow,
) -> Tensor:
    found = eagerly(_C.conv_dgrad, grad, weight, bias, input_size, *window)
    if found is not None:
        return found
    if needs_grad(grad, weight, bias):
        return ConvDgrad.apply(grad, weight, bias, input_size, window)
    return _ops.conv_dgrad(grad, weight, bias, input_size, *window)


def conv_wgrad(input: Tensor, grad: Tensor, weight_size: torch.Size, window: ConvWindow) -> Tensor:
    if needs_grad(input, grad):
        return ConvWgrad.apply(input, grad, weight_size, window)
    return _ops.conv_wgrad(input, grad, weight_size, *window)


def conv_bias_grad(grad: Tensor) -> Tensor:
    return ConvBiasGrad.apply(grad) if needs_grad(grad) else _ops.conv_bias_grad(grad)
