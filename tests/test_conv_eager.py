"""The eager path of convolution: what it takes, what it declines, and its derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import weft.functional as W
from weft import _C
from weft.conv_ops import Conv, ConvActivated, ConvDgrad, ConvWindow

WINDOW = ConvWindow((2, 1), (1, 2), (1, 2), 2)
DEPTHWISE = ConvWindow((1, 1), (1, 1), (1, 1), 4)
UNEVEN = ConvWindow((1, 1), (1, 0, 0, 1), (1, 1), 2)  # leading, then trailing padding
SIZE = (2, 4, 7, 8)
NODES = ("ConvBackward", "ConvActivatedBackward", "ConvDgradBackward")


def one_each(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The parameters of a depthwise convolution of four channels."""
    return weight[:4, :1], bias if bias is None else bias[:4]


# The eager path, and the Function that defines it.
OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "conv": (
        lambda x, w, b: _C.conv(x, w, b, *WINDOW),
        lambda x, w, b: Conv.apply(x, w, b, WINDOW),
    ),
    "conv, uneven padding": (
        lambda x, w, b: _C.conv(x, w, b, *UNEVEN),
        lambda x, w, b: Conv.apply(x, w, b, UNEVEN),
    ),
    "activated": (
        lambda x, w, b: _C.conv_activated(x, w, b, "leaky_relu", 0.2, *WINDOW),
        lambda x, w, b: ConvActivated.apply(x, w, b, "leaky_relu", 0.2, WINDOW),
    ),
    "depthwise, activated": (
        lambda x, w, b: _C.conv_activated(x, *one_each(w, b), "tanh", 0.0, *DEPTHWISE),
        lambda x, w, b: ConvActivated.apply(x, *one_each(w, b), "tanh", 0.0, DEPTHWISE),
    ),
    "transposed": (
        lambda gy, w, b: _C.conv_dgrad(gy, w, b, SIZE, *WINDOW),
        lambda gy, w, b: ConvDgrad.apply(gy, w, b, SIZE, WINDOW),
    ),
}


def arguments(name: str, last: bool = False) -> list[Tensor]:
    sizes = (
        [(2, 6, 4, 8), (6, 2, 3, 3), (4,)] if name == "transposed" else [SIZE, (6, 2, 3, 3), (6,)]
    )
    tensors = [torch.randn(size) for size in sizes]
    if last:
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    return [t.requires_grad_() for t in tensors]


def derivatives(op: Callable[..., Any], args: list[Any]) -> list[Tensor]:
    """Output, gradients, and the gradients of the sum of their squares."""
    wanted = [t for t in args if t is not None and t.requires_grad]
    y = op(*args)
    gy = torch.linspace(-1, 1, y.numel()).reshape(y.shape).requires_grad_()
    plain = torch.autograd.grad(op(*args), wanted, gy.detach())
    linked = torch.autograd.grad(y, wanted, gy, create_graph=True)
    squares = sum(g.square().sum() for g in linked)
    second = torch.autograd.grad(squares, [gy, *wanted], allow_unused=True, materialize_grads=True)
    return [y, *plain, *linked, *second]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("missing", [None, 0, 1, 2, "bias"])
def test_same_bits_as_the_function(name: str, last: bool, missing: int | str | None) -> None:
    args: list[Any] = arguments(name, last)
    if missing == "bias":
        args[2] = None
    elif isinstance(missing, int):
        args[missing].requires_grad_(False)
    eager, function = OPS[name]
    assert eager(*args).grad_fn.name() in NODES
    for actual, expected in zip(derivatives(eager, args), derivatives(function, args), strict=True):
        assert torch.equal(actual, expected)
        assert actual.stride() == expected.stride()


def test_no_channels_make_none_and_leave_the_bias_alone() -> None:
    x, w, b = torch.randn(2, 0, 5, 5), torch.randn(3, 0, 3, 3), torch.randn(3, requires_grad=True)
    y = W.conv2d(x, w, b)
    assert y.shape == (2, 0, 3, 3)
    y.sum().backward()
    assert torch.equal(b.grad, torch.zeros(3))


@pytest.mark.parametrize("name", OPS)
def test_declines_what_is_not_plain(name: str) -> None:
    eager, _ = OPS[name]
    args = arguments(name)
    assert eager(args[0].as_subclass(type("Subclass", (Tensor,), {})), *args[1:]) is None
    with torch.autocast("cpu"):
        assert eager(*args) is None
    assert _C.conv(*arguments("conv"), 2, (1, 1), (1, 1), 2) is None
    assert _C.conv(*arguments("conv"), (1, 1.0), (1, 1), (1, 1), 2) is None


def test_no_tensor() -> None:
    with pytest.raises(TypeError, match="must be Tensors, not None"):
        _C.conv(None, torch.randn(6, 2, 3, 3), None, *WINDOW)


def test_no_graph_without_gradients() -> None:
    x, w, b = arguments("conv")
    with torch.no_grad():
        assert not W.conv2d(x, w, b, groups=2).requires_grad
    assert W.conv2d(x.detach(), w.detach(), groups=2).grad_fn is None


def test_saved_tensors_that_were_changed_in_place_are_noticed() -> None:
    x, w, b = arguments("conv")
    y = W.conv2d(x, w, b, groups=2)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
