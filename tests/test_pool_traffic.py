"""What the CUDA pooling kernels move, against the least that the problem needs.

Host execution counts the 32-byte sectors that each block touches, once per block. The least is
every operand once: the input, the output, and the places that max pooling keeps.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import weft
import weft.functional as W
from weft.testing import Launch, host_execution

# The published problems and some that are not, with the batch (and, where channels are planes of
# their own, the channels) cut down: name, channels where they are last (0: not so laid out),
# extents, window.
PROBLEMS: list[tuple[str, int, tuple[int, ...], dict[str, Any]]] = [
    ("pool2d", 64, (112, 112), {"kernel_size": 3, "stride": 2, "padding": 1}),
    ("pool2d", 64, (112, 112), {"kernel_size": 2, "stride": 2}),
    ("pool2d", 192, (28, 28), {"kernel_size": 3, "stride": 1, "padding": 1}),
    ("pool1d", 0, (4096,), {"kernel_size": 2}),
    ("pool1d", 0, (4096,), {"kernel_size": 15}),
    ("pool3d", 32, (16, 56, 56), {"kernel_size": 3, "stride": 2}),
    ("pool3d", 32, (16, 56, 56), {"kernel_size": 2, "stride": 2}),
    ("pool2d", 0, (56, 56), {"kernel_size": 13, "stride": 1, "padding": 6}),
    ("pool2d", 0, (56, 56), {"kernel_size": 31, "stride": 1, "padding": 15}),
    ("pool2d", 16, (56, 56), {"kernel_size": 13, "stride": 1, "padding": 6}),
    ("pool2d", 16, (112, 112), {"kernel_size": 9, "stride": 1, "padding": 4}),
    ("pool2d", 48, (57, 61), {"kernel_size": 3, "stride": 2, "padding": 1}),
    ("pool2d", 96, (7, 7), {"kernel_size": 3, "stride": 1, "padding": 1}),
    ("adaptive_pool2d", 256, (56, 56), {"output_size": 7}),
    ("adaptive_pool2d", 256, (56, 56), {"output_size": 1}),
]


def moved(launch: Launch, *operands: torch.Tensor) -> float:
    return launch.traffic / sum(t.nbytes for t in operands)


CASES = [
    pytest.param(
        *p,
        last,
        id=f"{p[0]}-{'x'.join(map(str, p[2]))}-{'-'.join(map(str, p[3].values()))}"
        f"-{'channels_last' if last else 'contiguous'}",
    )
    for p in PROBLEMS
    for last in ([False, True] if p[1] else [False])
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize(("name", "channels", "extents", "window", "last"), CASES)
def test_traffic_is_near_the_least(
    name: str,
    channels: int,
    extents: tuple[int, ...],
    window: dict[str, Any],
    last: bool,
    kind: str,
    dtype: torch.dtype,
) -> None:
    x = torch.randn(1, channels if last else 8, *extents).to(dtype)
    if last:
        x = x.contiguous(
            memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        )
    x.requires_grad_()
    wide = window.get("kernel_size", 0) > 16  # places of more than a byte
    op = getattr(W, name.replace("pool", f"{kind}_pool"))
    with host_execution() as run:
        y = op(x, **window)
        (gx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    forward, backward = run.launches
    kept = [y.detach().to(torch.int32 if wide else torch.uint8)] if kind == "max" else []
    assert moved(forward, x, y, *kept) <= 1.25
    assert moved(backward, gx, y, *kept) <= 1.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [13, 15, 17, 21, 25, 31])
def test_traffic_of_high_windows(size: int, stride: int, kind: str, dtype: torch.dtype) -> None:
    """Channels-last, by the plan: what it expects is what `test_explain.py` finds counted."""
    op = W.max_pool2d if kind == "max" else W.avg_pool2d
    for channels in (16, 64, 96):
        for extent in (32, 56, 57, 112, 224):
            x = torch.empty(8, channels, extent, extent, dtype=dtype, device="meta")
            x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
            plans = weft.explain(op, x, size, stride, size // 2, backward=True, target="cuda")
            for plan in plans:
                # Half types: sums of 31 rows of 112 columns and 16 channels take more than a block
                # has; halves of a row meet in 30 columns of gradients and of places of four bytes.
                widest = kind == "max" and size == 31 and extent > 100 and plan.phase == "backward"
                most = 1.41 if widest and stride == 1 and dtype == torch.bfloat16 else 1.25
                assert plan.path == "tile"
                assert plan.bytes <= most * plan.least_bytes, (channels, extent, plan)


@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("size", [15, 25, 31])
def test_traffic_of_high_windows_counted(size: int, kind: str) -> None:
    op = W.max_pool2d if kind == "max" else W.avg_pool2d
    x = torch.randn(1, 16, 40, 56).bfloat16().contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    with host_execution() as run:
        y = op(x, size, 1, size // 2)
        (gx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    kept = [y.detach().to(torch.int32 if size > 16 else torch.uint8)] if kind == "max" else []
    forward, backward = run.launches
    assert moved(forward, x, y, *kept) <= 1.25
    assert moved(backward, gx, y, *kept) <= 1.25


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("window", [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2}], ids=str)
def test_traffic_of_what_follows_from_places(window: dict[str, Any], last: bool) -> None:
    """Indices read a byte an output; the double backward picks from the whole map."""
    x = torch.randn(1, 32, 56, 56)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    with host_execution() as run:
        y, indices = W.max_pool2d(x, **window, return_indices=True)
        g = torch.ones_like(y).requires_grad_()
        (gx,) = torch.autograd.grad(y, x, g, create_graph=True)
        torch.autograd.grad(gx, g, torch.ones_like(gx))
    places = y.detach().to(torch.uint8)
    launches = {launch.kernel: launch for launch in run.launches}
    assert moved(launches["max_pool_indices"], indices, places) <= 1.25
    assert moved(launches["max_pool_pick"], x, y, places) <= 1.25
