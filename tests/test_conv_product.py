"""Convolution's CUDA kernels on the tile product: exact sums, paths, TF32, traffic."""

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
from weft.testing import Launch, host_execution

LAST = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}
BACKENDS = ["cuda-on-host"] + (["cuda"] if torch.cuda.is_available() else [])

# Input size, weight size, window. All large enough for a product in all three directions.
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ((2, 16, 9, 10), (24, 16, 3, 3), {"padding": 1}),
    "odd": ((2, 11, 9, 10), (13, 11, 3, 2), {}),
    "grouped": ((2, 32, 8, 9), (48, 16, 3, 3), {"padding": 1, "groups": 2}),
    "everything": (
        (2, 16, 13, 14),
        (16, 16, 3, 2),
        {"stride": (2, 3), "padding": (2, 1), "dilation": (1, 2)},
    ),
    "pointwise": ((3, 24, 11, 7), (40, 24, 1, 1), {"stride": 2}),
    "gaps": ((2, 16, 17, 16), (16, 16, 2, 2), {"stride": 3, "padding": 1}),
    "common_factor": ((2, 16, 15, 14), (16, 16, 3, 3), {"stride": (2, 4), "dilation": 2}),
    "line": ((3, 16, 45), (24, 16, 4), {"padding": 3, "stride": 2}),
    "volume": ((1, 16, 5, 6, 7), (16, 16, 2, 3, 2), {"padding": 1, "stride": (1, 2, 1)}),
    "many_channels": ((1, 72, 9, 8), (80, 72, 2, 2), {}),
}


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where CUDA kernels run."""
    host = request.param == "cuda-on-host"
    with host_execution() if host else nullcontext():
        yield torch.device("cpu" if host else "cuda")


def integers(size: tuple[int, ...], like: torch.dtype, device: torch.device) -> Tensor:
    return torch.randint(-3, 4, size, device=device).to(like)


def conv(rank: int, module: Any) -> Any:
    return getattr(module, f"conv{rank}d")


def check_exact(
    case: str, dtype: torch.dtype, last: bool, device: torch.device, with_bias: bool = True
) -> None:
    """Sums of small integers are exact in every dtype, so all bits are known."""
    input_size, weight_size, window = CASES[case]
    layout = LAST[len(input_size)] if last else torch.contiguous_format
    rank = len(input_size) - 2
    x = integers(input_size, dtype, device).contiguous(memory_format=layout).requires_grad_()
    w = integers(weight_size, dtype, device).requires_grad_()
    b = integers(weight_size[:1], dtype, device).requires_grad_() if with_bias else None
    leaves = [t for t in (x, w, b) if t is not None]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    expected = conv(rank, F)(*doubles, **window)
    actual = conv(rank, W)(x, w, b, **window)
    assert torch.equal(actual, expected.to(dtype))
    seed = torch.randint(-2, 3, actual.shape, device=device)
    check_exact_gradients(actual, expected, leaves, doubles, seed)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_integers_are_exact(
    case: str, dtype: torch.dtype, last: bool, device: torch.device
) -> None:
    check_exact(case, dtype, last, device)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("case", ["plain", "odd", "everything", "many_channels"])
def test_tf32_is_exact_on_integers(case: str, last: bool, device: torch.device) -> None:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        check_exact(case, torch.float32, last, device, with_bias=False)


def test_tf32_obeys_the_switch(device: torch.device) -> None:
    x = torch.full((2, 16, 8, 8), 1 + 2.0**-12, device=device)
    w = torch.zeros(16, 16, 1, 1, device=device)
    w[:, 0] = 2
    for allowed, expected in ((False, 2 + 2.0**-11), (True, 2.0)):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
            assert (W.conv2d(x, w) == expected).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_maps(dtype: torch.dtype, device: torch.device) -> None:
    """Maps that begin inside a pack of 16 bytes are read element by element."""
    base = integers((2 * 9 * 10 * 16 + 1,), dtype, device)
    x = base[1:].view(2, 9, 10, 16).permute(0, 3, 1, 2)
    w = integers((24, 16, 3, 3), dtype, device)
    expected = F.conv2d(x.double(), w.double()).to(dtype)
    assert torch.equal(W.conv2d(x, w), expected)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "sigmoid"])
def test_a_fused_activation_has_the_bits_of_the_two_in_sequence(
    activation: str, device: torch.device
) -> None:
    x = torch.randn(2, 16, 9, 10, device=device).bfloat16()
    w = torch.randn(24, 16, 3, 3, device=device).bfloat16()
    b = torch.randn(24, device=device).bfloat16()
    sums = W.conv2d(x, w, b).float()
    slope = 0.25
    expected = {
        "relu": sums.relu(),
        "leaky_relu": F.leaky_relu(sums, slope),
        "tanh": sums.tanh(),
        "sigmoid": sums.sigmoid(),
    }[activation].bfloat16()
    one = [1, 1]
    fused = torch.ops.weft.conv_activated(x, w, b, activation, slope, one, [0, 0], one, 1)
    if activation in ("relu", "leaky_relu"):
        assert torch.equal(fused, expected)
    else:  # rounded from float32 functions of another library
        torch.testing.assert_close(fused, expected)


# ---- on the host: which kernels run, and what they move ------------------------------------------


def launches(size: tuple[int, ...], weight: tuple[int, ...], **window: Any) -> list[Launch]:
    x = torch.ones(size, dtype=torch.bfloat16).contiguous(memory_format=LAST[len(size)])
    w = torch.ones(weight, dtype=torch.bfloat16).contiguous(memory_format=LAST[len(size)])
    x.requires_grad_()
    w.requires_grad_()
    with host_execution() as run:
        y = W.conv2d(x, w, **window)
        torch.autograd.grad(y, (x, w), torch.ones_like(y))
    return run.launches


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_a_product(case: str) -> None:
    input_size, weight_size, window = CASES[case]
    rank = len(input_size) - 2
    x = torch.ones(input_size, requires_grad=True)
    w = torch.ones(weight_size, requires_grad=True)
    with host_execution() as run:
        y = conv(rank, W)(x, w, **window)
        torch.autograd.grad(y.sum(), (x, w))
    kernels = {launch.kernel for launch in run.launches}
    assert kernels == {
        "conv_fprop_product",
        "conv_dgrad_product",
        "conv_wgrad_product",
        "conv_wgrad_sum",
    }


@pytest.mark.parametrize(("stride", "count"), [(1, 1), (2, 1), ((5, 4), 2)])
def test_the_phases_of_a_strided_input_gradient_share_launches(stride: Any, count: int) -> None:
    size, weight = (2, 16, 25, 24), (16, 16, 3, 3)
    names = [r.kernel for r in launches(size, weight, stride=stride, padding=1)]
    assert names.count("conv_dgrad_product") == count


def test_few_channels_and_small_problems_walk() -> None:
    for size, weight, window in (
        ((2, 32, 12, 12), (32, 1, 3, 3), {"groups": 32}),
        ((1, 8, 4, 4), (8, 8, 1, 1), {}),
    ):
        names = {r.kernel for r in launches(size, weight, **window)}
        assert not any("product" in name for name in names)


def test_many_positions_and_channels_take_large_tiles() -> None:
    """One tile of 128 x 128 for each multiprocessor of the largest GPU, and the same bits."""
    x = integers((33, 8, 16, 16), torch.bfloat16, torch.device("cpu"))
    w = integers((256, 8, 1, 1), torch.bfloat16, torch.device("cpu"))
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    with host_execution() as run:
        y = W.conv2d(x, w)
    (launch,) = run.launches
    assert launch.blocks == 33 * 16 * 16 // 128 * 2
    assert launch.shared_bytes <= 96 * 1024  # what a block may have on every GPU from sm_80 on
    assert torch.equal(y, F.conv2d(x.float(), w.float()).bfloat16())


def test_a_window_is_read_once_a_tile() -> None:
    """Not once a place: a tile of 64 positions reads the rows of the map that its windows meet."""
    channels, extent, tile = 64, 28, 64
    fprop, dgrad, *_ = launches((1, channels, extent, extent), (64, channels, 3, 3), padding=1)
    blocks = -(-(extent * extent) // tile)
    met = tile + 2 * (extent + 1)
    expected = blocks * 2 * (met * channels + 64 * channels * 9 + tile * 64)
    for launch in (fprop, dgrad):
        assert launch.blocks == blocks
        assert launch.traffic <= 1.05 * expected


def test_weight_gradients_are_split_over_positions() -> None:
    *_, product, total = launches((4, 64, 28, 28), (64, 64, 1, 1))
    assert (product.kernel, total.kernel) == ("conv_wgrad_product", "conv_wgrad_sum")
    # 3136 positions are 98 steps of 32; at least 8 to a block makes 11 blocks of 9.
    assert product.blocks == 11
    maps = 2 * 4 * 28 * 28 * 64 * 2
    assert product.traffic <= maps + product.blocks * 64 * 64 * 4
