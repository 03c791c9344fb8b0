"""Pooling layers."""

from __future__ import annotations

import torch
from torch import Tensor

from weft import pool


class MaxPool1d(torch.nn.MaxPool1d):
    """`torch.nn.MaxPool1d` on `weft.functional.max_pool1d`."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return pool.max_pool1d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
        )


class MaxPool2d(torch.nn.MaxPool2d):
    """`torch.nn.MaxPool2d` on `weft.functional.max_pool2d`."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return pool.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
        )


class MaxPool3d(torch.nn.MaxPool3d):
    """`torch.nn.MaxPool3d` on `weft.functional.max_pool3d`."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return pool.max_pool3d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
        )


class AvgPool1d(torch.nn.AvgPool1d):
    """`torch.nn.AvgPool1d` on `weft.functional.avg_pool1d`."""

    def forward(self, input: Tensor) -> Tensor:
        return pool.avg_pool1d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
        )


class AvgPool2d(torch.nn.AvgPool2d):
    """`torch.nn.AvgPool2d` on `weft.functional.avg_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        return pool.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AvgPool3d(torch.nn.AvgPool3d):
    """`torch.nn.AvgPool3d` on `weft.functional.avg_pool3d`."""

    def forward(self, input: Tensor) -> Tensor:
        return pool.avg_pool3d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveMaxPool1d(torch.nn.AdaptiveMaxPool1d):
    """`torch.nn.AdaptiveMaxPool1d` on `weft.functional.adaptive_max_pool1d`."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return pool.adaptive_max_pool1d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool2d(torch.nn.AdaptiveMaxPool2d):
    """`torch.nn.AdaptiveMaxPool2d` on `weft.functional.adaptive_max_pool2d`."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return pool.adaptive_max_pool2d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool3d(torch.nn.AdaptiveMaxPool3d):
    """`torch.nn.AdaptiveMaxPool3d` on `weft.functional.adaptive_max_pool3d`."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return pool.adaptive_max_pool3d(input, self.output_size, self.return_indices)


class AdaptiveAvgPool1d(torch.nn.AdaptiveAvgPool1d):
    """`torch.nn.AdaptiveAvgPool1d` on `weft.functional.adaptive_avg_pool1d`."""

    def forward(self, input: Tensor) -> Tensor:
        return pool.adaptive_avg_pool1d(input, self.output_size)


class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    """`torch.nn.AdaptiveAvgPool2d` on `weft.functional.adaptive_avg_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        return pool.adaptive_avg_pool2d(input, self.output_size)


class AdaptiveAvgPool3d(torch.nn.AdaptiveAvgPool3d):
    """`torch.nn.AdaptiveAvgPool3d` on `weft.functional.adaptive_avg_pool3d`."""

    def forward(self, input: Tensor) -> Tensor:
        return pool.adaptive_avg_pool3d(input, self.output_size)


# ---- layers that torch does not have -------------------------------------------------------------


class ChannelPool(torch.nn.Module):
    """Maximum or mean over groups of consecutive channels; the map's extents stay.

    `weft.functional.channel_pool` as a layer: ``[N, C, …]`` → ``[N, C / kernel_size, …]``. After a
    convolution of ``kernel_size`` times the wanted channels, its maximum is a maxout layer.

    Args:
        kernel_size: channels in a group.
        mode: "max" or "mean".
        stride: from group to group; default `kernel_size`.
        ceil_mode: with a last, smaller group where the channels do not divide.
        dim: the channel axis.
    """

    def __init__(
        self,
        kernel_size: int,
        mode: pool.Mode = "max",
        stride: int | None = None,
        ceil_mode: bool = False,
        dim: int = 1,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.mode = mode
        self.stride = kernel_size if stride is None else stride
        self.ceil_mode = ceil_mode
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        return pool.channel_pool(
            input, self.kernel_size, self.mode, self.stride, self.ceil_mode, self.dim
        )

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, mode={self.mode}, stride={self.stride}, "
            f"ceil_mode={self.ceil_mode}, dim={self.dim}"
        )


class Maxout(torch.nn.Linear):
    """Maxout units: ``y[k] = max_j (W x + b)[k·pieces + j]``, ``[*, I]`` → ``[*, K]``.

    Goodfellow et al., Maxout Networks, ICML 2013. A linear layer of ``pieces`` rows per output,
    whose parameters are `torch.nn.Linear`'s, and `ChannelPool` over them. The convolutional form is
    ``Sequential(Conv2d(C, pieces * K, …), ChannelPool(pieces))``.

    Args:
        in_features: I.
        out_features: K.
        pieces: linear pieces of each unit.
        bias: with ``b``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pieces: int = 2,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if pieces < 1:
            raise ValueError(f"Maxout: pieces must be at least 1, got {pieces}")
        super().__init__(in_features, out_features * pieces, bias, device, dtype)
        self.pieces = pieces

    def forward(self, input: Tensor) -> Tensor:
        return pool.channel_pool(super().forward(input), self.pieces, dim=-1)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features // self.pieces}, "
            f"pieces={self.pieces}, bias={self.bias is not None}"
        )


class WeightedAvgPool2d(torch.nn.Module):
    """LeNet-5's subsampling: the window's mean times a learned coefficient plus a learned bias.

    `weft.functional.weighted_avg_pool2d` as a layer; one coefficient (first 1) and one bias
    (first 0) per channel.

    Args:
        channels: C of the input.
        kernel_size, stride, padding, ceil_mode, count_include_pad: as `torch.nn.AvgPool2d`.
        bias: with a bias.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: pool.Size,
        stride: pool.Size | None = None,
        padding: pool.Size = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad
        self.weight = torch.nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.empty_like(self.weight)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return pool.weighted_avg_pool2d(
            input,
            self.weight,
            self.bias,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
        )

    def extra_repr(self) -> str:
        return (
            f"channels={len(self.weight)}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, bias={self.bias is not None}"
        )
