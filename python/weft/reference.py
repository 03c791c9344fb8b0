"""Plain definitions, in torch's operations, of what torch does not have.

What weft's kernels are tested against, in tests and by `python -m weft check`: slow and readable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def channel_pool(
    input: Tensor,
    kernel_size: int,
    mode: str = "max",
    stride: int | None = None,
    ceil_mode: bool = False,
    dim: int = 1,
) -> Tensor:
    """`weft.functional.channel_pool`, one group after another."""
    channels, stride = input.shape[dim], kernel_size if stride is None else stride
    steps = (channels - kernel_size) / stride
    last = (math.ceil(steps) if ceil_mode else math.floor(steps)) * stride
    groups = []
    for begin in range(0, min(last, channels - 1) + 1, stride):
        group = input.narrow(dim, begin, min(kernel_size, channels - begin))
        groups.append(group.max(dim).values if mode == "max" else group.mean(dim))
    return torch.stack(groups, dim)


def weighted_avg_pool2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, kernel_size: int, **window: Any
) -> Tensor:
    """`weft.functional.weighted_avg_pool2d` on torch's average pooling."""
    y = F.avg_pool2d(input, kernel_size, **window) * weight[:, None, None]
    return y if bias is None else y + bias[:, None, None]


def _rounded(value: float) -> int:
    """Halves away from zero."""
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


def _bins(begin: int, extent: int, bins: int, limit: int) -> list[slice]:
    """Where each bin of an axis lies on the map; an empty bin's slice is empty."""
    edges = [(begin + b * extent // bins, begin - (-(b + 1) * extent // bins)) for b in range(bins)]
    return [slice(max(first, 0), max(min(last, limit), 0)) for first, last in edges]


def roi_pool(
    input: Tensor,
    boxes: Tensor,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    mode: str = "max",
) -> Tensor:
    """`weft.functional.roi_pool`, one bin after another; boxes [K, 5]."""
    sizes = tuple(output_size) if isinstance(output_size, Sequence) else (output_size,) * 2
    wide = boxes if boxes.dtype == torch.float64 else boxes.float()
    scaled = (wide[:, 1:] * spatial_scale).tolist()
    reduce = F.adaptive_max_pool2d if mode == "max" else F.adaptive_avg_pool2d
    outputs = []
    for image, (x1, y1, x2, y2) in zip(boxes[:, 0].long().tolist(), scaled, strict=True):
        rows, columns = (
            _bins(_rounded(a), max(_rounded(b) - _rounded(a) + 1, 1), bins, limit)
            for a, b, bins, limit in zip((y1, x1), (y2, x2), sizes, input.shape[2:], strict=True)
        )
        bins = []
        for h in rows:
            for w in columns:
                crop = input[image, :, h, w]
                empty = crop.shape[1] == 0 or crop.shape[2] == 0
                bins.append(crop.sum((1, 2)) if empty else reduce(crop, 1).flatten())
        outputs.append(torch.stack(bins, 1).reshape(-1, *sizes))
    return torch.stack(outputs) if outputs else input.new_empty(0, input.shape[1], *sizes)


def spatial_pyramid_pool2d(
    input: Tensor,
    levels: Sequence[int] = (1, 2, 4),
    mode: str = "max",
    boxes: Tensor | None = None,
    spatial_scale: float = 1.0,
) -> Tensor:
    """`weft.functional.spatial_pyramid_pool2d`, level after level."""
    whole = F.adaptive_max_pool2d if mode == "max" else F.adaptive_avg_pool2d
    pooled = [
        whole(input, level) if boxes is None else roi_pool(input, boxes, level, spatial_scale, mode)
        for level in levels
    ]
    return torch.cat([one.flatten(1) for one in pooled], 1)


def mdlstm2d(x: Tensor, w_ih: Tensor, w_above: Tensor, w_left: Tensor, bias: Tensor) -> Tensor:
    """`weft.functional.mdlstm2d`, site by site."""
    height, width, batch, _ = x.shape
    zero = x.new_zeros(batch, w_above.shape[1])
    states: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for row in range(height):
        for column in range(width):
            h_above, c_above = states.get((row - 1, column), (zero, zero))
            h_left, c_left = states.get((row, column - 1), (zero, zero))
            sums = x[row, column] @ w_ih.t() + h_above @ w_above.t() + h_left @ w_left.t() + bias
            i, a, b, g, o = sums.chunk(5, -1)
            c = torch.sigmoid(a) * c_above + torch.sigmoid(b) * c_left
            c = c + torch.sigmoid(i) * torch.tanh(g)
            states[row, column] = (torch.sigmoid(o) * torch.tanh(c), c)
    rows = [torch.stack([states[y, x][0] for x in range(width)]) for y in range(height)]
    return torch.stack(rows)
