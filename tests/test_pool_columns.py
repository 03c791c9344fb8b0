"""Max pooling's gradients where many windows hold an input: added by columns on CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import weft.functional as W

# Channels, extents, window: each so that more than sixteen windows hold an input.
PROBLEMS: list[tuple[int, tuple[int, ...], dict[str, Any]]] = [
    (3, (41,), {"kernel_size": 19, "stride": 1, "padding": 9}),
    (2, (9, 11), {"kernel_size": 5, "stride": 1, "padding": 2}),
    (4, (40, 9), {"kernel_size": (31, 3), "stride": 1, "padding": (15, 1)}),
    (8, (37, 13), {"kernel_size": 9, "stride": 2, "padding": 4}),
    (16, (30, 31), {"kernel_size": 13, "stride": 1, "padding": 6}),
    (5, (29, 30), {"kernel_size": (7, 5), "stride": (1, 2), "dilation": (3, 2), "padding": 2}),
    (8, (23, 17), {"kernel_size": 17, "stride": 3, "padding": 8, "ceil_mode": True}),
    (8, (7, 12, 9), {"kernel_size": (3, 5, 3), "stride": 1, "padding": 1}),
    (3, (9, 10, 8), {"kernel_size": 4, "stride": 1, "dilation": 2, "padding": 2}),
]


CASES = [(*p, last) for p in PROBLEMS for last in ([False, True] if len(p[1]) > 1 else [False])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "extents", "window", "last"), CASES)
def test_gradients_of_high_windows(
    channels: int,
    extents: tuple[int, ...],
    window: dict[str, Any],
    last: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Small integers with many ties: exact in every dtype."""
    rank = len(extents)
    x = torch.randint(0, 9, (2, channels, *extents), device=device).to(dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last if rank == 2 else torch.channels_last_3d)
    x.requires_grad_()
    y = getattr(W, f"max_pool{rank}d")(x, **window)
    exact = x.detach().double().requires_grad_()
    expected = getattr(F, f"max_pool{rank}d")(exact, **window)
    assert torch.equal(y.double(), expected)
    g = (torch.rand(expected.shape, device=device) < 0.1).double()
    (gx,) = torch.autograd.grad(y, x, g.to(dtype))
    (expected_gx,) = torch.autograd.grad(expected, exact, g)
    assert torch.equal(gx.double(), expected_gx)
