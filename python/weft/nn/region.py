"""Pooling layers over regions of a map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weft import region
from weft.pool import Mode


class RoIPool(torch.nn.Module):
    """`weft.functional.roi_pool` as a layer, in the place of `torchvision.ops.RoIPool`.

    Args:
        output_size: bins along H and W, an int or two.
        spatial_scale: positions of the map per unit of the boxes.
        mode: "max" or "mean".
    """

    def __init__(
        self, output_size: int | Sequence[int], spatial_scale: float = 1.0, mode: Mode = "max"
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.mode = mode

    def forward(self, input: Tensor, boxes: region.Boxes) -> Tensor:
        return region.roi_pool(input, boxes, self.output_size, self.spatial_scale, self.mode)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, mode={self.mode}"
        )


class SpatialPyramidPool2d(torch.nn.Module):
    """`weft.functional.spatial_pyramid_pool2d` as a layer (He et al., SPP-net, 2014).

    ``layer(x)`` pools the whole map of each image, ``layer(x, boxes)`` each box of it; both give
    ``C·Σ levels²`` numbers, whatever the map's extents.

    Args:
        levels: bins along each axis, one int per level.
        mode: "max" or "mean" of each bin.
        spatial_scale: positions of the map per unit of the boxes.
    """

    def __init__(
        self, levels: Sequence[int] = (1, 2, 4), mode: Mode = "max", spatial_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.mode = mode
        self.spatial_scale = spatial_scale

    def forward(self, input: Tensor, boxes: region.Boxes | None = None) -> Tensor:
        return region.spatial_pyramid_pool2d(
            input, self.levels, self.mode, boxes, self.spatial_scale
        )

    def extra_repr(self) -> str:
        return f"levels={self.levels}, mode={self.mode}, spatial_scale={self.spatial_scale}"
