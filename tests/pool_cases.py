"""What the pooling tests share: both libraries' ops, layouts, and problems for any op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import weft.functional as W
from harness import DTYPES, LAYOUTS

_KINDS = ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool")
OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    f"{kind}{rank}d": (getattr(W, f"{kind}{rank}d"), getattr(F, f"{kind}{rank}d"))
    for kind in _KINDS
    for rank in (1, 2, 3)
}


def _avg_pool3d(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """torch's, which it does not have for half types on CPU."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return F.avg_pool3d(x.float() if half else x, *args, **kwargs).to(x.dtype)


OPS["avg_pool3d"] = (W.avg_pool3d, _avg_pool3d)
FIXED = [name for name in OPS if not name.startswith("adaptive")]
ADAPTIVE = [name for name in OPS if name.startswith("adaptive")]
MODULES = [
    getattr(torch.nn, f"{kind}{rank}d")
    for kind in ("MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool")
    for rank in (1, 2, 3)
]

each_op = pytest.mark.parametrize("name", OPS)
each_max = pytest.mark.parametrize("name", [name for name in OPS if "max" in name])
each_adaptive = pytest.mark.parametrize("name", ADAPTIVE)
each_plane = pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_layout = pytest.mark.parametrize("layout", LAYOUTS[2], ids=str)
each_last = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])


def rank_of(name: str) -> int:
    return int(name[-2])


def window_of(name: str) -> tuple[Any, ...]:
    """Positional arguments after the input that suit any map of at least 3 positions an axis."""
    return (3,) if name.startswith("adaptive") else (3, 2, 1)


def in_layout(x: torch.Tensor, rank: int, last: bool) -> torch.Tensor:
    """Contiguous, or channels-last where the rank has such a layout."""
    if not last or rank == 1:
        return x.contiguous()
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[rank])


def random_map(name: str, *batch: int, extents: tuple[int, int, int] = (5, 8, 9)) -> torch.Tensor:
    return torch.randn(*batch, *extents[-rank_of(name) :])
