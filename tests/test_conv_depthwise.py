"""CUDA kernels of depthwise convolution and of few channels a group: exact sums whatever the tiles,
and what they move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import weft.functional as W
from harness import DTYPES, check_exact_gradients
from weft.testing import host_execution

LAST = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}
BACKENDS = ["cuda-on-host"] + (["cuda"] if torch.cuda.is_available() else [])

# Size, window extents, window: whole planes, several to a block, cut along each axis, odd chunks.
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "small_planes": ((5, 6, 7, 9), (3, 3), {"padding": 1}),
    "odd_channels": ((2, 21, 11, 13), (3, 2), {"padding": (2, 1), "stride": 2}),
    "chunks": ((2, 72, 9, 8), (3, 3), {"padding": 1}),
    "tall": ((1, 8, 150, 90), (3, 3), {"padding": 1}),
    "tall_strided": ((1, 8, 150, 90), (5, 3), {"padding": 2, "stride": (3, 2)}),
    "wide": ((1, 2, 6, 9000), (2, 5), {"padding": (0, 4), "stride": (1, 2)}),
    "dilated": ((2, 8, 17, 19), (3, 3), {"padding": 4, "stride": 2, "dilation": (2, 3)}),
    "factor": ((2, 8, 17, 19), (3, 3), {"padding": 3, "stride": (4, 3), "dilation": (2, 3)}),
    "window_over_map": ((3, 8, 6, 5), (11, 9), {"padding": (5, 4)}),
    "gaps": ((2, 8, 17, 16), (2, 2), {"stride": 5, "padding": 1}),
    "line": ((2, 12, 500), (4,), {"padding": 3}),
    "volume": ((1, 10, 5, 20, 21), (3, 2, 3), {"padding": 1, "stride": (1, 2, 1)}),
}


# The same of groups: channels in and out of one, images, groups, extents of map and window, window.
GROUPED: dict[str, tuple[int, int, int, int, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "multiplier": (1, 2, 3, 9, (7, 9), (3, 3), {"padding": 1}),
    "multiplier_strided": (1, 3, 2, 8, (13, 12), (3, 2), {"padding": 1, "stride": 2}),
    "divisor": (3, 1, 2, 7, (9, 8), (3, 3), {"padding": (0, 1)}),
    "groups_of_four": (4, 4, 2, 6, (12, 11), (3, 3), {"padding": 1}),
    "uneven_groups": (
        3,
        5,
        2,
        5,
        (11, 13),
        (3, 3),
        {"padding": 2, "dilation": 2, "stride": (1, 3)},
    ),
    "one_group": (1, 6, 3, 1, (14, 15), (5, 5), {"padding": 2}),
    "pointwise": (4, 4, 2, 8, (9, 9), (1, 1), {}),
    "tall": (2, 2, 1, 4, (150, 90), (3, 3), {"padding": 1}),
    "line": (2, 4, 2, 5, (300,), (4,), {"padding": 3}),
    "volume": (2, 3, 1, 4, (5, 10, 11), (3, 2, 3), {"padding": 1, "stride": (1, 2, 1)}),
    "factor": (2, 2, 2, 4, (17, 19), (3, 3), {"padding": 3, "stride": (4, 3), "dilation": (2, 3)}),
}


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where CUDA kernels run."""
    host = request.param == "cuda-on-host"
    with host_execution() if host else nullcontext():
        yield torch.device("cpu" if host else "cuda")


def depthwise(
    module: Any, x: Tensor, w: Tensor, b: Tensor | None, window: dict[str, Any]
) -> Tensor:
    groups = x.shape[1] // w.shape[1]
    return getattr(module, f"conv{x.dim() - 2}d")(x, w, b, groups=groups, **window)


def check_integers(
    x: Tensor, w: Tensor, b: Tensor, window: dict[str, Any], dtype: torch.dtype
) -> None:
    """Values and gradients, bit for bit; gradients are few ones, so that half types hold sums."""
    leaves = [t.requires_grad_() for t in (x, w, b)]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    expected = depthwise(F, *doubles, window)
    actual = depthwise(W, x, w, b, window)
    assert torch.equal(actual, expected.to(dtype))
    seed = torch.rand(actual.shape, device=x.device) < 100 / actual.numel()
    check_exact_gradients(actual, expected, leaves, doubles, seed)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_integers_are_exact(
    case: str, dtype: torch.dtype, last: bool, device: torch.device
) -> None:
    size, kernel, window = CASES[case]
    layout = LAST[len(size)] if last else torch.contiguous_format
    x = torch.randint(-3, 4, size, device=device).to(dtype).contiguous(memory_format=layout)
    w = torch.randint(-3, 4, (size[1], 1, *kernel), device=device).to(dtype)
    b = torch.randint(-3, 4, size[1:2], device=device).to(dtype)
    check_integers(x, w, b, window, dtype)


def grouped(
    case: str, dtype: torch.dtype, last: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    c, k, images, groups, extents, kernel, window = GROUPED[case]
    layout = LAST[len(extents) + 2] if last else torch.contiguous_format
    x = torch.randint(-3, 4, (images, groups * c, *extents), device=device).to(dtype)
    w = torch.randint(-3, 4, (groups * k, c, *kernel), device=device).to(dtype)
    b = torch.randint(-3, 4, (groups * k,), device=device).to(dtype)
    return x.contiguous(memory_format=layout), w, b, window


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GROUPED)
def test_integers_of_groups_are_exact(
    case: str, dtype: torch.dtype, last: bool, device: torch.device
) -> None:
    x, w, b, window = grouped(case, dtype, last, device)
    check_integers(x, w, b, window, dtype)


@pytest.mark.parametrize("case", GROUPED)
def test_every_case_of_groups_is_tiled(case: str) -> None:
    x, w, _, window = grouped(case, torch.float32, False, torch.device("cpu"))
    with host_execution() as run:
        y = depthwise(W, x.requires_grad_(), w.requires_grad_(), None, window)
        torch.autograd.grad(y.sum(), (x, w))
    names = {launch.kernel for launch in run.launches}
    assert names - {"conv_wgrad_sum"} == {f"conv_grouped_{n}" for n in ("fprop", "dgrad", "wgrad")}


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_tiled(case: str) -> None:
    size, kernel, window = CASES[case]
    x = torch.ones(size, requires_grad=True)
    w = torch.ones(size[1], 1, *kernel, requires_grad=True)
    with host_execution() as run:
        torch.autograd.grad(depthwise(W, x, w, None, window).sum(), (x, w))
    names = {launch.kernel for launch in run.launches}
    assert names >= {"conv_depthwise_fprop", "conv_depthwise_dgrad", "conv_depthwise_wgrad"}
    assert names <= {
        "conv_depthwise_fprop",
        "conv_depthwise_dgrad",
        "conv_depthwise_wgrad",
        "conv_wgrad_sum",
    }


def test_misaligned_maps(device: torch.device) -> None:
    for dtype in DTYPES:
        base = torch.randint(-3, 4, (2 * 9 * 10 * 16 + 1,), device=device).to(dtype)
        w = torch.randint(-3, 4, (16, 1, 3, 3), device=device).to(dtype)
        for x in (base[1:].view(2, 9, 10, 16).permute(0, 3, 1, 2), base[1:].view(2, 16, 9, 10)):
            expected = depthwise(F, x.double(), w.double(), None, {"padding": 1}).to(dtype)
            assert torch.equal(depthwise(W, x, w, None, {"padding": 1}), expected)


# ---- traffic -------------------------------------------------------------------------------------

# Images, channels, extents, window. The published problems and some that are not, with images and,
# where they are planes of their own, channels cut down.
PROBLEMS: list[tuple[int, int, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    (1, 32, (112, 112), (3, 3), {"padding": 1}),
    (1, 48, (56, 56), (3, 3), {"padding": 1, "stride": 2}),
    (2, 64, (14, 14), (5, 5), {"padding": 2}),
    (2, 32, (56, 56), (7, 7), {"padding": 3}),
    (1, 32, (14, 14), (31, 31), {"padding": 15}),
    (1, 64, (2048,), (4,), {"padding": 3}),
    (1, 32, (8, 28, 28), (3, 3, 3), {"padding": 1}),
    (2, 40, (28, 30), (5, 5), {"padding": 2, "stride": 2}),
]
# Channels in and out of a group, besides.
GROUPED_PROBLEMS: list[
    tuple[int, int, int, int, tuple[int, ...], tuple[int, ...], dict[str, Any]]
] = [
    (4, 4, 1, 32, (28, 28), (3, 3), {"padding": 1}),
    (1, 2, 1, 32, (56, 56), (3, 3), {"padding": 1}),
    (2, 2, 1, 32, (56, 56), (3, 3), {"padding": 1, "stride": 2}),
    (3, 3, 2, 16, (28, 28), (5, 5), {"padding": 2}),
    (2, 6, 2, 16, (28, 28), (3, 3), {"padding": 1}),
    (1, 6, 8, 1, (28, 28), (5, 5), {"padding": 2}),
]


def check_traffic(x: Tensor, w: Tensor, window: dict[str, Any], kernels: str) -> None:
    """Every operand once is the least; partial sums of weights are on top of it."""
    x.requires_grad_()
    w.requires_grad_()
    with host_execution() as run:
        y = depthwise(W, x, w, None, window)
        torch.autograd.grad(y, (x, w), torch.ones_like(y))
    moved: dict[str, int] = {}
    for launch in run.launches:
        name = launch.kernel.replace("conv_wgrad_sum", f"{kernels}_wgrad")
        moved[name] = moved.get(name, 0) + launch.traffic
    least = sum(t.nbytes for t in (x, w, y))
    ratios = {name: bytes / least for name, bytes in moved.items()}
    assert set(ratios) == {f"{kernels}_{n}" for n in ("fprop", "dgrad", "wgrad")}
    assert max(ratios.values()) <= 1.25, ratios


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: "x".join(map(str, (*p[2], *p[3]))))
def test_traffic_is_near_the_least(problem: Any, dtype: torch.dtype, last: bool) -> None:
    images, channels, extents, kernel, window = problem
    if last and len(extents) == 1:
        last = False
    layout = LAST[len(extents) + 2] if last else torch.contiguous_format
    x = torch.randn(images, channels, *extents).to(dtype).contiguous(memory_format=layout)
    check_traffic(x, torch.randn(channels, 1, *kernel).to(dtype), window, "conv_depthwise")


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("problem", GROUPED_PROBLEMS, ids=str)
def test_traffic_of_groups_is_near_the_least(problem: Any, dtype: torch.dtype, last: bool) -> None:
    c, k, images, groups, extents, kernel, window = problem
    layout = LAST[len(extents) + 2] if last else torch.contiguous_format
    x = torch.randn(images, groups * c, *extents).to(dtype).contiguous(memory_format=layout)
    w = torch.randn(groups * k, c, *kernel).to(dtype)
    check_traffic(x, w, window, "conv_grouped")
