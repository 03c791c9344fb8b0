"""Convolution layers."""

from __future__ import annotations

import torch
from torch import Tensor

from weft import conv


class Conv2d(torch.nn.Conv2d):
    """`torch.nn.Conv2d` on `weft.functional.conv2d`."""

    def forward(self, input: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = torch.nn.functional.pad(
                input, self._reversed_padding_repeated_twice, mode=self.padding_mode
            )
            padding = 0
        return conv.conv2d(
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups
        )
