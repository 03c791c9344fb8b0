"""Convolution layers.

A lazy layer takes its number of input channels from its first input, and is from then on the layer
that it is named after.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weft import conv


def _padded(module: Any, input: Tensor) -> tuple[Tensor, int | tuple[int, ...] | str]:
    """The input and what is left to pad: `padding_mode` other than "zeros" is done here."""
    if module.padding_mode == "zeros":
        return input, module.padding
    sides = module._reversed_padding_repeated_twice
    return torch.nn.functional.pad(input, sides, mode=module.padding_mode), 0


def _transposed(
    function: Any, module: Any, input: Tensor, output_size: Sequence[int] | None
) -> Tensor:
    """`function` with the output padding that gives `output_size`, as torch finds it."""
    size = None if output_size is None else list(output_size)
    stride, padding, dilation = module.stride, module.padding, module.dilation
    kernel = module.kernel_size
    extra = module._output_padding(input, size, stride, padding, kernel, len(kernel), dilation)
    weight, bias = module.weight, module.bias
    return function(input, weight, bias, stride, padding, extra, module.groups, dilation)


class Conv1d(torch.nn.Conv1d):
    """`torch.nn.Conv1d` on `weft.functional.conv1d`."""

    def forward(self, input: Tensor) -> Tensor:
        input, padding = _padded(self, input)
        return conv.conv1d(
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups
        )


class Conv2d(torch.nn.Conv2d):
    """`torch.nn.Conv2d` on `weft.functional.conv2d`."""

    def forward(self, input: Tensor) -> Tensor:
        input, padding = _padded(self, input)
        return conv.conv2d(
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups
        )


class Conv3d(torch.nn.Conv3d):
    """`torch.nn.Conv3d` on `weft.functional.conv3d`."""

    def forward(self, input: Tensor) -> Tensor:
        input, padding = _padded(self, input)
        return conv.conv3d(
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups
        )


class ConvTranspose1d(torch.nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` on `weft.functional.conv_transpose1d`."""

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        return _transposed(conv.conv_transpose1d, self, input, output_size)


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` on `weft.functional.conv_transpose2d`."""

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        return _transposed(conv.conv_transpose2d, self, input, output_size)


class ConvTranspose3d(torch.nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` on `weft.functional.conv_transpose3d`."""

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        return _transposed(conv.conv_transpose3d, self, input, output_size)


class LazyConv1d(torch.nn.LazyConv1d, Conv1d):  # type: ignore[misc]
    """`torch.nn.LazyConv1d` that becomes weft's `Conv1d`."""

    cls_to_become = Conv1d


class LazyConv2d(torch.nn.LazyConv2d, Conv2d):  # type: ignore[misc]
    """`torch.nn.LazyConv2d` that becomes weft's `Conv2d`."""

    cls_to_become = Conv2d


class LazyConv3d(torch.nn.LazyConv3d, Conv3d):  # type: ignore[misc]
    """`torch.nn.LazyConv3d` that becomes weft's `Conv3d`."""

    cls_to_become = Conv3d


class LazyConvTranspose1d(torch.nn.LazyConvTranspose1d, ConvTranspose1d):  # type: ignore[misc]
    """`torch.nn.LazyConvTranspose1d` that becomes weft's `ConvTranspose1d`."""

    cls_to_become = ConvTranspose1d


class LazyConvTranspose2d(torch.nn.LazyConvTranspose2d, ConvTranspose2d):  # type: ignore[misc]
    """`torch.nn.LazyConvTranspose2d` that becomes weft's `ConvTranspose2d`."""

    cls_to_become = ConvTranspose2d


class LazyConvTranspose3d(torch.nn.LazyConvTranspose3d, ConvTranspose3d):  # type: ignore[misc]
    """`torch.nn.LazyConvTranspose3d` that becomes weft's `ConvTranspose3d`."""

    cls_to_become = ConvTranspose3d
