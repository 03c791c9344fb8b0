"""Convolution on Hopper's warpgroup products: the same sums as the plain kernels, path by path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import weft
import weft.functional as W
from harness import check_against_native, check_exact_gradients
from weft.testing import Launch, host_execution, sm90a_kernels

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
HALVES = [torch.bfloat16, torch.float16]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
BACKENDS = ["cuda-on-host"] + (["cuda"] if HOPPER else [])

# Input size, weight size, window; channels-last. A tile has 128 positions, a step 64 channels.
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ((2, 16, 9, 10), (24, 16, 3, 3), {"padding": 1}),
    "unpadded": ((2, 24, 9, 10), (16, 24, 3, 2), {}),
    "pointwise": ((3, 24, 11, 7), (40, 24, 1, 1), {}),
    "many_channels": ((1, 136, 9, 8), (72, 136, 2, 2), {"padding": 1}),
    "one_step": ((1, 64, 16, 16), (64, 64, 1, 1), {}),
    "wide_window": ((1, 16, 12, 13), (16, 16, 5, 7), {"padding": (2, 3)}),
    "more_padding_than_window": ((1, 16, 8, 8), (16, 16, 2, 2), {"padding": 3}),
    "strided": ((2, 16, 13, 14), (16, 16, 3, 2), {"stride": (2, 3), "padding": (2, 1)}),
    "dilated": ((2, 16, 13, 12), (24, 16, 3, 3), {"padding": 2, "dilation": 2}),
    "everything": (
        (3, 40, 15, 14),
        (32, 40, 3, 2),
        {"stride": (2, 3), "padding": (2, 1), "dilation": (1, 2)},
    ),
    "gaps": ((2, 16, 17, 16), (16, 16, 2, 2), {"stride": (3, 8), "padding": 1}),
    "one_column": ((4, 16, 40, 1), (16, 16, 3, 1), {"padding": (1, 0)}),
    "one_row": ((4, 16, 1, 200), (16, 16, 1, 3), {"padding": (0, 150), "dilation": (1, 100)}),
    "many_windows": ((1, 16, 33, 32), (24, 16, 2, 1), {"padding": (1, 0)}),
    "volume": ((1, 16, 5, 6, 7), (16, 16, 2, 3, 2), {"padding": 1}),
    "strided_volume": ((2, 16, 5, 6, 7), (16, 16, 3, 3, 2), {"padding": 1, "stride": (1, 2, 1)}),
    "place_in_padding": ((3, 16, 1, 90), (16, 16, 1, 3), {"stride": (3, 2), "padding": (1, 0)}),
}

# What phases of a strided input gradient can meet: unequal ones, ones without places or of far
# outputs, inputs that no window reads, more of them than a launch takes.
STRIDED: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "halves": ((2, 16, 16, 18), (24, 16, 3, 3), {"stride": 2, "padding": 1}),
    "odd_halves": ((2, 16, 15, 17), (24, 16, 3, 3), {"stride": 2}),
    "thirds": ((2, 16, 17, 19), (16, 16, 5, 4), {"stride": 3, "padding": (2, 1)}),
    "pointwise": ((3, 24, 13, 14), (40, 24, 1, 1), {"stride": 2}),
    "patches": ((2, 16, 16, 16), (32, 16, 4, 4), {"stride": 4}),
    "unread_end": ((2, 16, 17, 18), (16, 16, 2, 2), {"stride": 4}),
    "more_padding_than_window": ((2, 16, 14, 15), (16, 16, 2, 2), {"stride": 2, "padding": 5}),
    "dilation_of_the_stride": (
        (2, 16, 15, 14),
        (16, 16, 3, 3),
        {"stride": 2, "padding": 2, "dilation": 2},
    ),
    "dilation_apart": (
        (2, 16, 19, 18),
        (16, 16, 3, 4),
        {"stride": (2, 3), "padding": (3, 4), "dilation": (3, 2)},
    ),
    "dilation_and_stride_share": (
        (1, 16, 25, 26),
        (24, 16, 3, 3),
        {"stride": (4, 6), "padding": 4, "dilation": (6, 4)},
    ),
    "many_channels": ((1, 136, 12, 11), (72, 136, 3, 3), {"stride": 2, "padding": 1}),
    "long_stride": ((2, 16, 33, 10), (24, 16, 3, 3), {"stride": (9, 1)}),
    "many_phases": ((2, 16, 20, 22), (16, 16, 5, 6), {"stride": (4, 5), "padding": 2}),
    "row": ((4, 16, 1, 150), (16, 16, 1, 5), {"stride": (1, 3), "padding": (0, 2)}),
    "volume": ((2, 16, 6, 7, 8), (16, 16, 3, 2, 3), {"stride": (2, 3, 2), "padding": (1, 0, 1)}),
}


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where Hopper's kernels run; they are switched on."""
    host = request.param == "cuda-on-host"
    with host_execution() if host else nullcontext(), sm90a_kernels():
        yield torch.device("cpu" if host else "cuda")


def integers(size: tuple[int, ...], like: torch.dtype, device: torch.device) -> Tensor:
    return torch.randint(-3, 4, size, device=device).to(like)


def conv(rank: int, module: Any) -> Any:
    return getattr(module, f"conv{rank}d")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_integers_are_exact(case: str, dtype: torch.dtype, device: torch.device) -> None:
    """Sums of small integers are exact, so all bits are known."""
    input_size, weight_size, window = CASES[case]
    layout = LAST[len(input_size)]
    rank = len(input_size) - 2
    x = integers(input_size, dtype, device).contiguous(memory_format=layout).requires_grad_()
    w = integers(weight_size, dtype, device).requires_grad_()
    b = integers(weight_size[:1], dtype, device).requires_grad_()
    doubles = [t.detach().double().requires_grad_() for t in (x, w, b)]
    expected = conv(rank, F)(*doubles, **window)
    actual = conv(rank, W)(x, w, b, **window)
    assert torch.equal(actual, expected.to(dtype))
    seed = torch.randint(-2, 3, actual.shape, device=device)
    seed = seed.contiguous(memory_format=layout)
    check_exact_gradients(actual, expected, (x, w), doubles[:2], seed)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", STRIDED)
def test_input_gradients_by_phases_are_exact(
    case: str, dtype: torch.dtype, device: torch.device
) -> None:
    input_size, weight_size, window = STRIDED[case]
    layout = LAST[len(input_size)]
    module = conv(len(input_size) - 2, W), conv(len(input_size) - 2, F)
    x = torch.zeros(input_size, dtype=dtype, device=device).contiguous(memory_format=layout)
    w = integers(weight_size, dtype, device)
    doubles = x.double().requires_grad_(), w.double()
    expected = module[1](*doubles, **window)
    gy = integers(tuple(expected.shape), dtype, device).contiguous(memory_format=layout)
    (expected,) = torch.autograd.grad(expected, doubles[0], gy.double())
    with host_execution() if device.type == "cpu" else nullcontext() as run:
        (gx,) = torch.autograd.grad(module[0](x.requires_grad_(), w, **window), x, gy)
    assert torch.equal(gx, expected.to(dtype))
    assert run is None or {r.kernel for r in run.launches[1:]} == {"conv_dgrad_wgmma"}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", ["plain", "many_channels", "strided", "dilated", "volume"])
def test_as_accurate_as_native(case: str, dtype: torch.dtype, device: torch.device) -> None:
    input_size, weight_size, window = CASES[case]
    rank = len(input_size) - 2
    x = torch.randn(input_size, device=device).to(dtype)
    x = x.contiguous(memory_format=LAST[len(input_size)]).requires_grad_()
    w = torch.randn(weight_size, device=device).to(dtype).requires_grad_()
    b = torch.randn(weight_size[:1], device=device).to(dtype).requires_grad_()
    check_against_native(conv(rank, W), conv(rank, F), x, w, b, **window)


def test_transposed_convolution_with_a_bias(device: torch.device) -> None:
    """Its forward is the input gradient, with a bias for each channel of x."""
    x = integers((2, 16, 9, 10), torch.bfloat16, device)
    x = x.contiguous(memory_format=torch.channels_last)
    w = integers((16, 24, 3, 2), torch.bfloat16, device)
    b = integers((24,), torch.bfloat16, device)
    for window in (
        {},
        {"padding": (1, 0)},
        {"dilation": 2},
        {"stride": 2, "padding": 1, "output_padding": 1},
        {"stride": (3, 2), "dilation": (2, 1), "output_padding": (2, 0)},
        {"stride": 3},  # wider than the window: the bias alone reaches some outputs
    ):
        expected = F.conv_transpose2d(x.double(), w.double(), b.double(), **window)
        with host_execution() if device.type == "cpu" else nullcontext() as run:
            actual = W.conv_transpose2d(x, w, b, **window)
        assert torch.equal(actual, expected.bfloat16())
        assert run is None or [r.kernel for r in run.launches] == ["conv_dgrad_wgmma"]


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu", "tanh"])
def test_a_fused_activation_has_the_bits_of_the_two_in_sequence(
    activation: str, device: torch.device
) -> None:
    x = torch.randn(2, 16, 9, 10, device=device).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    w = torch.randn(24, 16, 3, 3, device=device).bfloat16()
    b = torch.randn(24, device=device).bfloat16()
    b[3] = torch.nan
    sums = W.conv2d(x, w, b)
    slope, one = 0.25, [1, 1]
    expected = {
        "none": sums,
        "relu": sums.relu(),
        "leaky_relu": F.leaky_relu(sums, slope),
        "tanh": sums.tanh(),
    }[activation]
    fused = torch.ops.weft.conv_activated(x, w, b, activation, slope, one, [0, 0], one, 1)
    torch.testing.assert_close(
        fused, expected, equal_nan=True, **({} if activation == "tanh" else {"rtol": 0, "atol": 0})
    )


@pytest.mark.parametrize("channels", [64, 128, 192, 256])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_width_of_a_tile(channels: int, dtype: torch.dtype, device: torch.device) -> None:
    """512 positions are four tiles, which is what host execution has multiprocessors for."""
    x = integers((2, 8, 16, 16), dtype, device).contiguous(memory_format=torch.channels_last)
    w = integers((channels, 8, 1, 1), dtype, device)
    assert torch.equal(W.conv2d(x, w), F.conv2d(x.float(), w.float()).to(dtype))
    # The other way round, with the weights along columns.
    wide = torch.zeros(2, channels, 16, 16, dtype=dtype, device=device)
    wide = wide.contiguous(memory_format=torch.channels_last).requires_grad_()
    v = integers((8, channels, 1, 1), dtype, device)
    v.requires_grad_()
    gx, gv = torch.autograd.grad(W.conv2d(wide + 1, v), (wide, v), x)
    assert torch.equal(gx, F.conv_transpose2d(x.float(), v.detach().float()).to(dtype))
    sums = x.double().sum((0, 2, 3))[:, None, None, None].to(dtype)
    assert torch.equal(gv, sums.expand_as(gv))


# ---- on the host: which kernels run, and what they move -----------------------------------------


def launches(size: tuple[int, ...], weight: tuple[int, ...], **window: Any) -> list[Launch]:
    dtype = window.pop("dtype", torch.bfloat16)
    layout = window.pop("layout", LAST[len(size)])
    x = torch.ones(size, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    w = torch.ones(weight, dtype=dtype)
    with host_execution() as run, sm90a_kernels():
        y = conv(len(size) - 2, W)(x, w, **window)
        torch.autograd.grad(y, x, torch.ones_like(y))
    return run.launches


@pytest.mark.parametrize("case", CASES)
def test_which_cases_run_on_hoppers_words(case: str) -> None:
    input_size, weight_size, window = CASES[case]
    fprop, *dgrad = (r.kernel for r in launches(input_size, weight_size, **window))
    assert fprop == "conv_fprop_wgmma"
    assert set(dgrad) == {"conv_dgrad_wgmma"}


@pytest.mark.parametrize("case", CASES)
def test_weight_gradients_run_on_hoppers_words(case: str) -> None:
    size, weight, window = CASES[case]
    x = torch.ones(size, dtype=torch.bfloat16).contiguous(memory_format=LAST[len(size)])
    w = torch.ones(weight, dtype=torch.bfloat16, requires_grad=True)
    module = conv(len(size) - 2, W)
    with sm90a_kernels():
        plan = weft.explain(module, x, w, **window, backward=True, target="cuda")[1]
        with host_execution() as run:
            module(x, w, **window).sum().backward()
    names = [r.kernel for r in run.launches]
    assert names[1:] == ["conv_wgrad_wgmma", "conv_wgrad_sum"]
    launch = run.launches[1]
    assert (plan.kernel, plan.blocks, plan.threads, plan.shared_bytes) == (
        launch.kernel,
        launch.blocks,
        launch.threads,
        launch.shared_bytes,
    )


OTHERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "float32": ((2, 16, 9, 10), (24, 16, 3, 3), {"dtype": torch.float32}),
    "contiguous": ((2, 16, 9, 10), (24, 16, 3, 3), {"layout": torch.contiguous_format}),
    "grouped": ((2, 32, 9, 10), (32, 16, 3, 3), {"groups": 2}),
    "odd_channels": ((2, 20, 9, 10), (24, 20, 3, 3), {}),
    "far_padding": ((1, 16, 9, 10), (16, 16, 3, 3), {"padding": (129, 0)}),
    "far_places": ((1, 16, 300, 2), (16, 16, 2, 2), {"dilation": (257, 1)}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_the_words_cannot_do_stays_with_the_tile_product(other: str) -> None:
    size, weight, window = OTHERS[other]
    assert all("wgmma" not in r.kernel for r in launches(size, weight, **window))


def test_long_strides_are_walked_by_phases_alone() -> None:
    fprop, dgrad = launches((2, 16, 33, 10), (24, 16, 3, 3), stride=(9, 1))
    assert (fprop.kernel, dgrad.kernel) == ("conv_fprop_product", "conv_dgrad_wgmma")


@pytest.mark.parametrize(("stride", "count"), [(2, 1), ((3, 5), 1), ((4, 5), 2)])
def test_phases_share_launches_of_as_many_blocks_as_planned(stride: Any, count: int) -> None:
    size, weight = (2, 16, 24, 25), (16, 16, 3, 3)
    x, w = (torch.ones(s, dtype=torch.bfloat16, device="meta") for s in (size, weight))
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    with sm90a_kernels():
        *_, plan = weft.explain(W.conv2d, x, w, stride=stride, backward=True, target="cuda")
    _, *ran = launches(size, weight, stride=stride)
    assert {r.kernel for r in ran} == {plan.kernel} == {"conv_dgrad_wgmma"}
    assert len(ran) == plan.launches == count
    assert sum(r.blocks for r in ran) == plan.blocks


def test_phases_read_no_zeros_in_between() -> None:
    """Four phases of 196 inputs with 4 + 2 + 2 + 1 places: 2 tiles a phase, which read the rows of
    the gradient that their windows meet once, and the weights of their places."""
    channels, extent, tile = 64, 28, 128
    met = tile + extent // 2 + 1
    expected = 2 * (8 * met * channels + 2 * 9 * 64 * channels + extent * extent * channels)
    _, dgrad = launches((1, channels, extent, extent), (64, channels, 3, 3), stride=2, padding=1)
    assert dgrad.blocks == 8
    assert dgrad.traffic <= 1.05 * expected


def test_tiles_are_wide_where_none_of_four_multiprocessors_idles() -> None:
    for extent, channels, blocks in ((16, 256, 4), (16, 192, 4), (8, 256, 4), (16, 320, 20)):
        fprop, dgrad = launches((2, 64, extent, extent), (channels, 64, 1, 1))
        assert fprop.blocks == blocks
        assert dgrad.blocks == 2 * extent * extent // 128  # 64 channels


def test_they_are_opt_in() -> None:
    x = torch.ones(2, 16, 9, 10, dtype=torch.bfloat16).contiguous(memory_format=LAST[4])
    w = torch.ones(24, 16, 3, 3, dtype=torch.bfloat16)
    with host_execution() as run:
        W.conv2d(x, w)
        with sm90a_kernels():
            W.conv2d(x, w)
        W.conv2d(x, w)
    names = [r.kernel for r in run.launches]
    assert names == ["conv_fprop_product", "conv_fprop_wgmma", "conv_fprop_product"]


def test_a_window_is_read_once_a_tile() -> None:
    """Not once a place: a tile of 128 positions reads the rows of the map that its windows meet."""
    channels, extent, tile = 64, 28, 128
    blocks = -(-(extent * extent) // tile)
    met = tile + 2 * (extent + 1)
    expected = blocks * 2 * (met * channels + 64 * channels * 9 + tile * 64)
    for launch in launches((1, channels, extent, extent), (64, channels, 3, 3), padding=1):
        assert launch.blocks == blocks
        assert launch.traffic <= 1.05 * expected


def test_plans_are_what_runs() -> None:
    """`weft.explain` takes a GPU with 132 multiprocessors; the problem has a tile for each."""
    x, w = (
        torch.ones(size, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
        for size in ((33, 64, 16, 32), (128, 64, 3, 3))
    )
    x.requires_grad_()
    with sm90a_kernels():
        fprop, dgrad = weft.explain(W.conv2d, x, w, padding=1, backward=True, target="cuda")
    assert (fprop.kernel, dgrad.kernel) == ("conv_fprop_wgmma", "conv_dgrad_wgmma")
    assert fprop.tile == {"m": 128, "n": 128, "k": 64}
    assert (fprop.blocks, fprop.threads) == (132, 288)
    assert fprop.shared_bytes == 4 * 2 * 128 * 128 + 64 + 1024
