"""Small windows of stride 2 along contiguous rows (csrc/pool/pool_pairs.h, pool_pairs_grad.h)."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import weft.functional as W
from harness import DTYPES
from weft import _C
from weft.testing import cpu_target

F = torch.nn.functional

# Rows that end before, at and after a vector of any target, and that are its ends alone.
WIDTHS = (4, 5, 15, 16, 31, 32, 33, 34, 63, 67, 130)
TARGETS = ("baseline", "avx2", "avx512")


def values(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Small integers, of which many are equal, with NaN and infinities among them."""
    x = torch.randint(-3, 4, size).to(dtype)
    odd = torch.rand(size)
    x[odd < 0.02] = torch.nan
    x[(odd > 0.02) & (odd < 0.3)] = -torch.inf
    x[odd > 0.98] = torch.inf
    return x


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maxima_and_their_places(dtype: torch.dtype, target: str) -> None:
    if target not in _C.available_cpu_targets():
        return
    for window, height in itertools.product((1, 2, 3, 4), (1, 3)):
        for width, padding in itertools.product(WIDTHS, (0, window // 2)):
            x = values((2, 7, width), dtype)
            options = {
                "kernel_size": (height, window),
                "stride": (1 + height % 2, 2),
                "padding": (0, padding),
                "return_indices": True,
            }
            with cpu_target(target):
                found, places = W.max_pool2d(x, **options)
                plain = W.max_pool2d(x, **options | {"return_indices": False})
            expected, indices = F.max_pool2d(x, **options)
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(plain, expected, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(places, indices), (window, height, width, padding)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_integers_are_exact(dtype: torch.dtype, target: str) -> None:
    """Sums of small integers, and their quotients by powers of two, have no rounding."""
    if target not in _C.available_cpu_targets():
        return
    for window, width in itertools.product((1, 2, 3, 4), WIDTHS):
        for height, stride in ((1, 2), (2, 2), (4, 1)):
            x = torch.randint(-3, 4, (3, 9, width)).to(dtype).requires_grad_()
            options = {
                "kernel_size": (height, window),
                "stride": (stride, 2),
                "padding": (0, window // 2),
            }
            for name in ("max", "avg"):
                more = {"divisor_override": 4} if name == "avg" else {}
                with cpu_target(target):
                    y = getattr(W, f"{name}_pool2d")(x, **options, **more)
                    grad = 4 * torch.randint_like(y, -3, 4)
                    (found,) = torch.autograd.grad(y, x, grad)
                expected = reference_gradient(name, x, grad, options)
                assert torch.equal(found, expected), (name, window, width, height)


def reference_gradient(name: str, x: Tensor, grad: Tensor, options: dict) -> Tensor:
    """PyTorch's, in float64."""
    wide = x.detach().double().requires_grad_()
    more = {"divisor_override": 4} if name == "avg" else {}
    y = getattr(F, f"{name}_pool2d")(wide, **options, **more)
    return torch.autograd.grad(y, wide, grad.double())[0].to(x.dtype)


def test_averages_without_padding_keep_their_divisors() -> None:
    for ceil_mode, include in itertools.product((False, True), (False, True)):
        options = {
            "kernel_size": 3,
            "stride": 2,
            "padding": 1,
            "ceil_mode": ceil_mode,
            "count_include_pad": include,
        }
        x = torch.randn(2, 3, 10, 38, dtype=torch.float64, requires_grad=True)
        y, expected = W.avg_pool2d(x, **options), F.avg_pool2d(x, **options)
        torch.testing.assert_close(y, expected)
        grad = torch.randn_like(y)
        torch.testing.assert_close(
            torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad)
        )


def test_large_maps_go_past_the_cache() -> None:
    x = torch.randint(-3, 4, (1, 2, 4104, 2056)).float().requires_grad_()
    for name in ("max", "avg"):
        y, expected = (getattr(m, f"{name}_pool2d")(x, 2) for m in (W, F))
        assert torch.equal(y, expected)
        grad = torch.randn_like(y)
        for f, e in zip(
            torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad), strict=True
        ):
            torch.testing.assert_close(f, e)
