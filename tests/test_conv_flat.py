"""Contiguous maps and windows of one place: products along an image's positions."""

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

# Size of the input, channels out, groups: panels of one to four vectors, a last one that is not
# full, terms of several runs, lanes of a row of weights left over, maps streamed past the cache.
CASES: dict[str, tuple[tuple[int, ...], int, int]] = {
    "line": ((3, 24, 65), 40, 1),
    "one panel": ((2, 17, 5, 9), 33, 1),
    "panels": ((3, 20, 13, 21), 16, 1),
    "many terms": ((2, 150, 8, 8), 70, 1),
    "many rows": ((2, 64, 9, 11), 200, 1),
    "grouped": ((2, 48, 7, 16), 66, 2),
    "volume": ((2, 16, 3, 5, 7), 19, 1),
    "whole walk": ((3, 16, 12, 10), 16, 1),
    "streamed": ((6, 16, 80, 80), 72, 1),
}
SMALL = [case for case in CASES if case != "streamed"]


def arguments(case: str, dtype: torch.dtype) -> tuple[list[Tensor], int, Any, Any]:
    size, out, groups = CASES[case]
    rank = len(size) - 2
    x = torch.randn(size).to(dtype)
    w = torch.randn(out, size[1] // groups, *(1,) * rank).to(dtype)
    inputs = [t.requires_grad_() for t in (x, w, torch.randn(out).to(dtype))]
    return inputs, groups, getattr(W, f"conv{rank}d"), getattr(F, f"conv{rank}d")


def window_of(x: Tensor, groups: int) -> ConvWindow:
    rank = x.dim() - 2
    return ConvWindow((1,) * rank, (0,) * rank, (1,) * rank, groups)


@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_native(case: str) -> None:
    for dtype in DTYPES if case in SMALL else [torch.float32]:
        inputs, groups, ours, native = arguments(case, dtype)
        check_against_native(
            lambda *t, f=ours, g=groups: f(*t, groups=g),
            lambda *t, f=native, g=groups: f(*t, groups=g),
            *inputs,
        )


@pytest.mark.parametrize("case", CASES)
def test_each_instruction_set(case: str) -> None:
    """Small integers, whose sums are exact; each gradient by itself, and all of one walk."""
    inputs, groups, ours, native = arguments(case, torch.float32)
    with torch.no_grad():
        for t in inputs:
            t.copy_(torch.randint(-2, 3, t.shape))
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    expected = native(*doubles, groups=groups)
    grad = torch.randint(-2, 3, expected.shape)
    exact = torch.autograd.grad(expected, doubles, grad.double())
    for target in ("baseline", "avx2", "avx512"):
        if target not in _C.available_cpu_targets():
            continue
        with cpu_target(target):
            actual = ours(*inputs, groups=groups)
            assert torch.equal(actual, expected.float())
            for wanted in ((0, 1, 2), (0,), (1,)):
                found = torch.autograd.grad(
                    actual, [inputs[i] for i in wanted], grad.float(), retain_graph=True
                )
                for got, i in zip(found, wanted, strict=True):
                    assert torch.equal(got, exact[i].float())


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("case", ["whole walk", "streamed"])
def test_the_activation_is_undone(case: str, activation: str) -> None:
    """The activation's gradient first, and then the three."""
    (x, w, b), groups, ours, _ = arguments(case, torch.float32)
    window = window_of(x, groups)
    y = conv_activated(x, w, b, activation, 0.2, window)
    plain = ours(x, w, b).detach()
    sum_of = {"leaky_relu": lambda t: F.leaky_relu(t, 0.2)}.get(
        activation, getattr(torch, activation, None)
    )
    torch.testing.assert_close(y.detach(), sum_of(plain))
    grad = torch.randn_like(y)
    undone = weft.conv_ops.of_sum(grad, y.detach(), activation, 0.2)
    found = torch.autograd.grad(y, (x, w, b), grad)
    expected = torch.ops.weft.conv_backward(x, undone, w, None, "none", 0, True, *window)
    for got, want in zip(found, expected, strict=True):
        if activation == "relu":  # whose gradient is not rounded
            assert torch.equal(got, want)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_bits_and_nan() -> None:
    inputs, _, ours, _ = arguments("whole walk", torch.float32)

    def run() -> list[Tensor]:
        y = ours(*inputs)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    check_deterministic(run)
    with torch.no_grad():
        inputs[0][0, 3, 5, 7] = torch.nan
    for x in (inputs[0].detach(), inputs[0].detach()[:1]):
        y = W.conv2d(x, *inputs[1:]).detach()
        assert y.isnan().sum() == y.shape[1]
        assert y[0, :, 5, 7].isnan().all()


@pytest.mark.parametrize(("target", "lanes"), [("avx512", 16), ("avx2", 8), ("baseline", 4)])
def test_which_are_flat(target: str, lanes: int) -> None:
    def paths(layer: Any, *size: int, dtype: torch.dtype = torch.float32) -> dict[str, str]:
        x = torch.randn(size, dtype=dtype, requires_grad=True)
        plans = weft.explain(layer.to(dtype), x, backward=True, target=target)
        return {p.kernel: p.path for p in plans if p.kernel != "conv_bias_grad"}

    layer = nn.Conv2d(32, 64, 1)
    assert paths(layer, 4, 32, 28, 28) == {"conv_fprop": "flat", "conv_backward": "flat"}
    # The sums that tasks of one walk would hold are more than the maps.
    one_by_one = {f"conv_{step}": "flat" for step in ("fprop", "dgrad", "wgrad")}
    assert paths(layer, 2, 32, 4, 4) == one_by_one
    assert set(paths(layer, 4, 32, 28, 28, dtype=torch.bfloat16).values()) == {"product"}
    # Too few positions for a vector, which are many channels then.
    wide = nn.Conv2d(256, 256, 1)
    assert set(paths(wide, 4, 256, 1, 1).values()) == {"product"}
    for other in (nn.Conv2d(32, 64, 1, stride=2), nn.Conv2d(32, 64, 1, padding=1)):
        assert set(paths(other, 4, 32, 28, 28).values()) == {"product"}
    few = nn.Conv2d(lanes - 1, 64, 1)
    assert "flat" not in paths(few, 4, lanes - 1, 28, 28).values()
    last = layer.to(memory_format=torch.channels_last)
    assert set(paths(last, 4, 32, 28, 28).values()) == {"product"}
