"""Few input channels, contiguous, on CPU: a copy of the rows for each column of the window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import weft
import weft.functional as W
from harness import DTYPES, check_against_native, check_deterministic
from weft import _C, nn
from weft.conv_ops import ConvWindow, conv_activated
from weft.testing import cpu_target

# Size of the input, size of the weights, window. All three products take this way on AVX2 and
# AVX-512, but for wgrad of short rows; of float64 those of the first three channels.
Case = tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]
CASES: dict[str, Case] = {
    "image": ((2, 3, 37, 41), (19, 3, 3, 3), {"stride": 2, "padding": 1}),
    "wide window": ((1, 3, 30, 33), (17, 3, 7, 7), {"stride": 2, "padding": 3}),
    "plain": ((3, 2, 20, 23), (16, 2, 3, 3), {"padding": 1}),
    "thirds": ((2, 2, 26, 31), (12, 2, 4, 4), {"stride": 3, "padding": 2}),
    "patches": ((2, 3, 28, 32), (24, 3, 4, 4), {"stride": 4}),
    "fifths": ((1, 1, 24, 43), (9, 1, 5, 6), {"stride": 5, "padding": 1}),
    "unread rows": ((2, 1, 25, 29), (10, 1, 2, 2), {"stride": 3}),
    "dilated": ((1, 2, 29, 35), (13, 2, 3, 2), {"stride": (1, 2), "dilation": (3, 2)}),
    "grouped": ((2, 4, 21, 27), (32, 2, 3, 3), {"stride": 2, "padding": 1, "groups": 2}),
    "line": ((3, 2, 199), (14, 2, 5), {"stride": 2, "padding": 4}),
    "volume": ((1, 1, 9, 13, 17), (32, 1, 3, 3, 3), {"padding": 1, "stride": (2, 1, 1)}),
    "small maps": ((40, 1, 9, 9), (8, 1, 3, 3), {"padding": 1}),
    "many terms": ((1, 2, 12, 14), (150, 2, 9, 9), {"padding": 4}),
    "bands": ((1, 3, 70, 90), (16, 3, 3, 3), {"padding": 1}),
}
# Past the cache: rows that are whole vectors, and not.
STREAMED: dict[str, Case] = {
    "aligned": ((2, 1, 128, 128), (80, 1, 3, 3), {"padding": 1}),
    "shifted": ((2, 2, 129, 131), (70, 2, 2, 2), {}),
}


def arguments(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], Any, Any]:
    size, weight, _ = case
    rank = len(size) - 2
    sizes = (size, weight, weight[:1])
    inputs = [torch.randn(s).to(dtype).requires_grad_() for s in sizes]
    return inputs, getattr(W, f"conv{rank}d"), getattr(F, f"conv{rank}d")


def targets() -> list[str]:
    return [t for t in ("baseline", "avx2", "avx512") if t in _C.available_cpu_targets()]


@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_native(case: str) -> None:
    window = CASES[case][2]
    for dtype in DTYPES:
        if (case, dtype) == ("bands", torch.float64):
            # The rule takes PyTorch's float64 as exact, which its sum over so many positions is
            # not; test_each_instruction_set holds this case to exact sums.
            continue
        inputs, ours, native = arguments(CASES[case], dtype)
        check_against_native(
            lambda *t, f=ours: f(*t, **window), lambda *t, f=native: f(*t, **window), *inputs
        )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_each_instruction_set(case: str, dtype: torch.dtype) -> None:
    """Small integers, whose sums are exact."""
    inputs, ours, native = arguments(CASES[case], dtype)
    window = CASES[case][2]
    with torch.no_grad():
        for t in inputs:
            t.copy_(torch.randint(-1, 2, t.shape))
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    expected = native(*doubles, **window)
    grad = torch.randint(-1, 2, expected.shape).to(dtype)
    exact = torch.autograd.grad(expected, doubles, grad.double())
    for target in targets():
        with cpu_target(target):
            actual = ours(*inputs, **window)
            assert torch.equal(actual, expected.to(dtype))
            for got, want in zip(torch.autograd.grad(actual, inputs, grad), exact, strict=True):
                assert torch.equal(got, want.to(dtype))


@pytest.mark.parametrize("case", CASES)
def test_the_path(case: str) -> None:
    size, weight, window = CASES[case]
    groups = window.get("groups", 1)
    x = torch.randn(size, requires_grad=True)
    conv = getattr(nn, f"Conv{len(size) - 2}d")
    layer = conv(size[1], weight[0], weight[2:], **window)
    paths = {p.kernel: p.path for p in weft.explain(layer, x, backward=True, target="avx512")}
    assert size[1] // groups == weight[1]
    assert paths["conv_fprop"] == paths["conv_dgrad"] == "columns"
    assert paths["conv_wgrad"] in ("columns", "product", "planes")


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("case", STREAMED)
def test_past_the_cache(case: str, activation: str) -> None:
    """An activation in the same pass has the bits of the two in sequence."""
    (x, w, b), ours, native = arguments(STREAMED[case], torch.float32)
    window = STREAMED[case][2]
    step = ConvWindow((1, 1), (window.get("padding", 0),) * 2, (1, 1), 1)
    with torch.no_grad():
        plain = ours(x, w, b, **window)
        if activation == "none":
            torch.testing.assert_close(plain, native(x, w, b, **window))
            return
        fused = conv_activated(x, w, b, activation, 0.2, step)
        small = torch.cat([conv_activated(i, w, b, activation, 0.2, step) for i in x.split(1)])
        assert torch.equal(fused, small)  # which stay in the cache
        expected = F.leaky_relu(plain, 0.2) if activation == "leaky_relu" else plain
        if activation in ("relu", "tanh", "sigmoid"):
            expected = getattr(torch, activation)(plain)
        if activation == "relu":
            assert torch.equal(fused, expected)
        torch.testing.assert_close(fused, expected)


@pytest.mark.parametrize("case", ["image", "wide window", "thirds", "patches", "volume", "bands"])
def test_bits_and_nan(case: str) -> None:
    """A number that is none reaches what its windows hold, and nothing else."""
    inputs, ours, native = arguments(CASES[case], torch.float32)
    window = CASES[case][2]

    def run() -> list[Tensor]:
        y = ours(*inputs, **window)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    check_deterministic(run)
    x, w, _ = (t.detach() for t in inputs)
    place = tuple(extent // 2 for extent in x.shape)
    x[place] = torch.nan
    grad = torch.ones_like(native(x, w, **window))
    grad[tuple(extent // 2 for extent in grad.shape)] = torch.nan
    found, expected = [], []
    for of, f in ((found, ours), (expected, native)):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        y = f(*leaves, **window)
        of.extend([y, *torch.autograd.grad(y, leaves, grad)])
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got.isnan(), want.isnan())
