"""Convolution: autograd Functions and the functional API.

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

from weft.autograd import Function, autocast_arguments, needs_grad

_ops = torch.ops.weft


class ConvWindow(NamedTuple):
    """The window arguments of a convolution, one int per spatial axis.

    ``padding`` may also hold twice as many: all leading ones, then all trailing ones.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


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
    window = ConvWindow(*window_args)
    rank = len(window.stride)
    size = [input.shape[0], weight.shape[0]]
    for i in range(rank):
        padded = input.shape[2 + i] + window.padding[i] + window.padding[i - rank]
        span = window.dilation[i] * (weight.shape[2 + i] - 1) + 1
        size.append((padded - span) // window.stride[i] + 1)
    return _empty(input, weight, size)


@torch.library.register_fake("weft::conv_dgrad")
def _(grad: Tensor, weight: Tensor, input_size: Sequence[int], *window: Any) -> Tensor:
    return _empty(grad, weight, input_size)


@torch.library.register_fake("weft::conv_wgrad")
def _(input: Tensor, grad: Tensor, weight_size: Sequence[int], *window: Any) -> Tensor:
    return _empty(input, grad, weight_size)


@torch.library.register_fake("weft::conv_bias_grad")
def _(grad: Tensor) -> Tensor:
    return grad.new_empty((grad.shape[1],))


# ---- autograd ------------------------------------------------------------------------------------


class Conv(Function):
    """y = x ⋆ w + b."""

    @staticmethod
    def compute(input: Tensor, weight: Tensor, bias: Tensor | None, window: ConvWindow) -> Tensor:
        return _ops.conv(input, weight, bias, *window)

    @staticmethod
    def save(ctx: Any, args: tuple, output: Tensor) -> None:
        input, weight, _, ctx.window = args
        ctx.sizes = input.shape, weight.shape
        input_needs, weight_needs, *_ = ctx.needs_input_grad
        ctx.save_for_backward(input if weight_needs else None, weight if input_needs else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        input_size, weight_size = ctx.sizes
        input_needs, weight_needs, bias_needs, _ = ctx.needs_input_grad
        return (
            conv_dgrad(grad, weight, input_size, ctx.window) if input_needs else None,
            conv_wgrad(input, grad, weight_size, ctx.window) if weight_needs else None,
            conv_bias_grad(grad) if bias_needs else None,
            None,
        )


class ConvDgrad(Function):
    """gx: for each input, the sum of gy · w over the windows that hold it."""

    @staticmethod
    def compute(
        grad: Tensor, weight: Tensor, input_size: torch.Size, window: ConvWindow
    ) -> Tensor:
        return _ops.conv_dgrad(grad, weight, input_size, *window)

    @staticmethod
    def save(ctx: Any, args: tuple, output: Tensor) -> None:
        grad, weight, _, ctx.window = args
        ctx.weight_size = weight.shape
        grad_needs, weight_needs, *_ = ctx.needs_input_grad
        ctx.save_for_backward(grad if weight_needs else None, weight if grad_needs else None)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        grad, weight = ctx.saved_tensors
        grad_needs, weight_needs, *_ = ctx.needs_input_grad
        return (
            conv(cotangent, weight, None, ctx.window) if grad_needs else None,
            conv_wgrad(cotangent, grad, ctx.weight_size, ctx.window) if weight_needs else None,
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
        input_needs, grad_needs, *_ = ctx.needs_input_grad
        ctx.save_for_backward(input if grad_needs else None, grad if input_needs else None)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        input, grad = ctx.saved_tensors
        input_needs, grad_needs, *_ = ctx.needs_input_grad
        return (
            conv_dgrad(grad, cotangent, ctx.input_size, ctx.window) if input_needs else None,
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
    if needs_grad(input, weight, bias):
        return Conv.apply(input, weight, bias, window)
    return _ops.conv(input, weight, bias, *window)


def conv_dgrad(
    grad: Tensor, weight: Tensor, input_size: torch.Size, window: ConvWindow
) -> Tensor:
    if needs_grad(grad, weight):
        return ConvDgrad.apply(grad, weight, input_size, window)
    return _ops.conv_dgrad(grad, weight, input_size, *window)


def conv_wgrad(input: Tensor, grad: Tensor, weight_size: torch.Size, window: ConvWindow) -> Tensor:
    if needs_grad(input, grad):
        return ConvWgrad.apply(input, grad, weight_size, window)
    return _ops.conv_wgrad(input, grad, weight_size, *window)


def conv_bias_grad(grad: Tensor) -> Tensor:
    return ConvBiasGrad.apply(grad) if needs_grad(grad) else _ops.conv_bias_grad(grad)


# ---- functional API ------------------------------------------------------------------------------


def _per_axis(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    if isinstance(value, Sequence):
        return (int(value[0]),) * rank if len(value) == 1 else tuple(value)
    return (value,) * rank


def _padding_of(
    padding: str, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """The numbers of "valid" and "same"; where "same" pads an odd number, the end gets the one."""
    if padding == "valid":
        return (0,) * len(kernel_size)
    if padding != "same":
        raise RuntimeError(
            f"weft: Invalid padding string: {padding!r}; expected 'valid', 'same' or ints"
        )
    if any(s != 1 for s in stride):
        raise RuntimeError(
            "weft: padding='same' is not supported for strided convolutions, "
            f"but got stride={tuple(stride)}"
        )
    total = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=False)]
    leading = tuple(t // 2 for t in total)
    trailing = tuple(t - t // 2 for t in total)
    return leading if leading == trailing else leading + trailing


def _conv_nd(
    rank: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> Tensor:
    if weight.dim() != rank + 2 or input.dim() not in (rank + 1, rank + 2):
        raise RuntimeError(
            f"weft: Expected {rank + 1}D (unbatched) or {rank + 2}D (batched) input to "
            f"conv{rank}d with a {rank + 2}D weight, but got input of size: {list(input.shape)} "
            f"and weight of size: {list(weight.shape)}. Expected {weight.dim()}-dimensional input "
            f"for {weight.dim()}-dimensional weight"
        )
    stride = _per_axis(stride, rank)
    dilation = _per_axis(dilation, rank)
    if isinstance(padding, str):
        padding = _padding_of(padding, weight.shape[2:], stride, dilation)
    else:
        padding = _per_axis(padding, rank)
        if len(padding) != rank:
            raise RuntimeError(
                f"weft: conv{rank}d: expected padding to be a single integer value or a list of "
                f"{rank} values to match the convolution dimensions, but got padding={padding}"
            )
    window = ConvWindow(stride, padding, dilation, groups)
    input, weight, bias = autocast_arguments(input, weight, bias)
    if input.dim() == rank + 2:
        return conv(input, weight, bias, window)
    return conv(input.unsqueeze(0), weight, bias, window).squeeze(0)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """2-d cross-correlation: ``y[n,k,h,w] = b[k] + Σ_{c,r,s} x[n, c, h·stride−pad+r·dil, …] w[k,c,r,s]``.

    Args as `torch.nn.functional.conv2d`. G groups of C input and K output channels:
        input: ``[N, G·C, H, W]`` or ``[G·C, H, W]``; float32, float64, bfloat16 or float16.
        weight: ``[G·K, C, R, S]``, of the input's dtype.
        bias: ``[G·K]`` or None.
        padding: zeros at both ends of each axis, or "valid" (none), or "same" (stride 1 only).

    The output ``[N, G·K, H', W']`` is channels-last if input or weight is. Half types accumulate in
    float32. Under autocast the arguments are cast to its dtype.

    Raises:
        RuntimeError: for sizes, groups, dtypes or windows that do not fit, as torch.
        NotImplementedError: for other dtypes.
    """  # noqa: E501
    return _conv_nd(2, input, weight, bias, stride, padding, dilation, groups)
