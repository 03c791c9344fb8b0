"""The eager path of pooling: what it takes, what it declines, and its derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import weft.functional as W
from weft import _C
from weft.pool_ops import AdaptiveWindow, AvgPool, AvgWindow, MaxPool, MaxWindow

_TWO, _ONE, _NONE = (2, 2), (1, 1), (0, 0)

# The eager path, and the Function that defines it.
OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "max": (
        lambda x: _C.max_pool(x, 2, 2, None, 0, 1, False),
        lambda x: MaxPool.apply(x, MaxWindow(_TWO, _TWO, _NONE, _ONE, False))[0],
    ),
    "avg": (
        lambda x: _C.avg_pool(x, 2, (3, 2), [2], (1,), True, False, None),
        lambda x: AvgPool.apply(x, AvgWindow((3, 2), _TWO, _ONE, True, False, None)),
    ),
    "adaptive max": (
        lambda x: _C.adaptive_max_pool(x, (2, 3)),
        lambda x: MaxPool.apply(x, AdaptiveWindow((2, 3)))[0],
    ),
    "adaptive avg": (
        lambda x: _C.adaptive_avg_pool(x, (2, 3)),
        lambda x: AvgPool.apply(x, AdaptiveWindow((2, 3))),
    ),
}


class _Subclass(Tensor):
    pass


def _derivatives(op: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Output, gradient, and the gradient of the squared gradient's sum with respect to gy."""
    y = op(x)
    gy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape).requires_grad_()
    (gx,) = torch.autograd.grad(y, x, gy, create_graph=True)
    (ggy,) = torch.autograd.grad(gx.square().sum(), gy)
    (plain,) = torch.autograd.grad(op(x), x, gy.detach())
    return [y, gx, ggy, plain]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_same_bits_as_the_function(name: str, last: bool) -> None:
    eager, function = OPS[name]
    x = torch.randn(2, 3, 7, 8)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    x.requires_grad_()
    assert eager(x).grad_fn.name() in ("MaxPoolBackward", "AvgPoolBackward")
    for actual, expected in zip(_derivatives(eager, x), _derivatives(function, x), strict=True):
        assert torch.equal(actual, expected)
        assert actual.stride() == expected.stride()


@pytest.mark.parametrize("name", OPS)
def test_declines(name: str) -> None:
    """What is not plain tensors and plain ints is left to the Function."""
    eager, _ = OPS[name]
    x = torch.randn(2, 3, 7, 8)
    assert eager(x.as_subclass(_Subclass)) is None
    with torch.autocast("cpu"):
        assert eager(x) is None
    assert torch.equal(torch.func.vmap(lambda t: W.max_pool2d(t, 2))(x), W.max_pool2d(x, 2))
    assert _C.max_pool(x, 2, 2.0, None, 0, 1, False) is None
    assert _C.max_pool(x, 2, (2, 2, 2), None, 0, 1, False) is None
    assert _C.max_pool(x, 2, 2, None, 0, 1, 0) is None
    assert _C.max_pool(x, 4, 2, None, 0, 1, False) is None
    assert _C.adaptive_avg_pool(x, (None, 2)) is None
    assert _C.adaptive_avg_pool(x, ()) is None


@pytest.mark.parametrize("name", OPS)
def test_no_tensor(name: str) -> None:
    with pytest.raises(TypeError, match="must be a Tensor, not None"):
        OPS[name][0](None)


def test_no_graph_without_gradients() -> None:
    x = torch.randn(1, 2, 6, 6, requires_grad=True)
    with torch.no_grad():
        assert not W.max_pool2d(x, 2).requires_grad
    assert W.max_pool2d(x.detach(), 2).grad_fn is None
