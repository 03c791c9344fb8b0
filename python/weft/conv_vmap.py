"""What `torch.func.vmap` does with the convolution ops.

Mapped samples become images of one batch; where weights are mapped too, or are what is asked for,
they become groups of one grouped convolution. Per-sample gradients are so one call of each kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weft.batching import mapped_first

_ops = torch.ops.weft


def _as_images(tensor: Tensor, dim: int) -> Tensor:
    """[B · N, ...]"""
    return tensor.movedim(dim, 0).flatten(0, 1)


def _as_channels(tensor: Tensor, dim: int | None, batch: int) -> Tensor:
    """[N, B · channels, ...]"""
    return mapped_first(tensor, dim, batch).movedim(0, 1).flatten(1, 2)


def _split(tensor: Tensor, axis: int, batch: int) -> Tensor:
    """Undoes `_as_images` (axis 0) and `_as_channels` (axis 1)."""
    parts = tensor.shape[axis] // batch
    return tensor.reshape(*tensor.shape[:axis], batch, parts, *tensor.shape[axis + 1 :])


def _with_bias(output: Tensor, bias: Tensor | None, bias_dim: int | None, rank: int) -> Tensor:
    """Adds [K] or [B, K] to [B, N, K, ...]."""
    if bias is None:
        return output
    bias = bias if bias_dim is None else bias.movedim(bias_dim, 0).unsqueeze(1)
    return output + bias.reshape(*bias.shape, *(1,) * rank)


def _map_conv(
    info: Any,
    in_dims: tuple[int | None, ...],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, int]:
    input_dim, weight_dim, bias_dim, *_ = in_dims
    batch, window = info.batch_size, (stride, padding, dilation)
    if weight_dim is not None:
        output = _ops.conv(
            _as_channels(input, input_dim, batch),
            weight.movedim(weight_dim, 0).flatten(0, 1),
            None if bias is None else mapped_first(bias, bias_dim, batch).flatten(),
            *window,
            batch * groups,
        )
        return _split(output, 1, batch), 1
    if input_dim is None:
        output = _ops.conv(input, weight, None, *window, groups).unsqueeze(0)
    else:
        images = _as_images(input, input_dim)
        shared = bias if bias_dim is None else None
        output = _split(_ops.conv(images, weight, shared, *window, groups), 0, batch)
    mapped = None if bias_dim is None else bias
    return _with_bias(output, mapped, bias_dim, len(stride)), 0


torch.library.register_vmap("weft::conv", _map_conv)


@torch.library.register_vmap("weft::conv_activated")
def _(
    info: Any,
    in_dims: tuple[int | None, ...],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    slope: float,
    *window: Any,
) -> tuple[Tensor, int]:
    # A bias that is mapped alone is added after the kernel, and so must the activation be.
    function = {
        "none": lambda y: y,
        "relu": torch.relu,
        "leaky_relu": lambda y: torch.nn.functional.leaky_relu(y, slope),
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
    }[activation]
    output, dim = _map_conv(info, in_dims, input, weight, bias, *window)
    return function(output), dim


@torch.library.register_vmap("weft::conv_dgrad")
def _(
    info: Any,
    in_dims: tuple[int | None, ...],
    grad: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, int]:
    grad_dim, weight_dim, bias_dim, *_ = in_dims
    batch, window = info.batch_size, (stride, padding, dilation)
    images, channels, *extents = input_size
    if weight_dim is not None:
        output = _ops.conv_dgrad(
            _as_channels(grad, grad_dim, batch),
            weight.movedim(weight_dim, 0).flatten(0, 1),
            None if bias is None else mapped_first(bias, bias_dim, batch).flatten(),
            [images, batch * channels, *extents],
            *window,
            batch * groups,
        )
        return _split(output, 1, batch), 1
    if grad_dim is None:
        output = _ops.conv_dgrad(grad, weight, None, input_size, *window, groups).unsqueeze(0)
    else:
        shared = bias if bias_dim is None else None
        size = [batch * images, channels, *extents]
        output = _split(
            _ops.conv_dgrad(_as_images(grad, grad_dim), weight, shared, size, *window, groups),
            0,
            batch,
        )
    mapped = None if bias_dim is None else bias
    return _with_bias(output, mapped, bias_dim, len(stride)), 0


@torch.library.register_vmap("weft::conv_wgrad")
def _(
    info: Any,
    in_dims: tuple[int | None, ...],
    input: Tensor,
    grad: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, int]:
    batch = info.batch_size
    output = _ops.conv_wgrad(
        _as_channels(input, in_dims[0], batch),
        _as_channels(grad, in_dims[1], batch),
        [batch * weight_size[0], *weight_size[1:]],
        stride,
        padding,
        dilation,
        batch * groups,
    )
    return _split(output, 0, batch), 0


@torch.library.register_vmap("weft::conv_bias_grad")
def _(info: Any, in_dims: tuple[int | None, ...], grad: Tensor) -> tuple[Tensor, int]:
    channels = _as_channels(grad, in_dims[0], info.batch_size)
    return _split(_ops.conv_bias_grad(channels), 0, info.batch_size), 0
