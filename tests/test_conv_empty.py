"""Convolutions of nothing: batches, maps, channels, groups, windows without elements, as PyTorch.

Where PyTorch fails by accident (an IndexError for a batch of none and an empty window), weft raises
RuntimeError. It also does for transposed convolution of a batch of none with empty maps, which
PyTorch takes.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import weft.functional as W
import weft.nn

# Batch, channels in and out, groups, extent, window, padding.
PROBLEMS = list(itertools.product((0, 2), (0, 4), (0, 4), (0, 1, 2), (0, 1, 5), (0, 1, 3), (0, 1)))


def outcome(function: Any, tensors: list[Tensor], **options: Any) -> Any:
    """The output and the gradients of a sum of squares, or the exception."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    try:
        y = function(*leaves, **options)
    except (RuntimeError, IndexError) as error:
        return error
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


def operands(
    rank: int, transposed: bool, problem: tuple[int, ...], device: torch.device
) -> list[Tensor]:
    n, c, k, groups, extent, window, _ = problem
    inner = (k if transposed else c) // max(groups, 1)
    sizes = (
        (n, c, *(extent,) * rank),
        (c if transposed else k, inner, *(window,) * rank),
        (inner * max(groups, 1) if transposed else k,),
    )
    # Whole numbers: every sum is exact.
    return [torch.randint(-2, 3, size, device=device).float() for size in sizes]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_as_torch(rank: int, transposed: bool, stride: int, device: torch.device) -> None:
    name = f"conv{'_transpose' if transposed else ''}{rank}d"
    for problem in PROBLEMS[:: 1 if rank == 2 else 5]:
        tensors = operands(rank, transposed, problem, device)
        options = {"stride": stride, "padding": problem[-1], "groups": problem[3]}
        expected = outcome(getattr(F, name), tensors, **options)
        found = outcome(getattr(W, name), tensors, **options)
        n, *_, extent, _, _ = problem
        if isinstance(expected, Exception) or (transposed and n == extent == 0):
            assert isinstance(found, RuntimeError), problem
            continue
        assert not isinstance(found, Exception), (problem, found)
        for f, e in zip(found, expected, strict=True):
            assert torch.equal(f, e), problem


def test_layers_of_no_channels(device: torch.device) -> None:
    x = torch.randn(2, 0, 5, 5, device=device, requires_grad=True)
    with pytest.warns(UserWarning, match="zero-element"):
        layer = weft.nn.Conv2d(0, 3, 3, device=device)
    y = layer(x)
    assert y.shape == (2, 0, 3, 3)
    y.sum().backward()
    assert torch.equal(layer.bias.grad, torch.zeros(3, device=device))
    arguments = (x, layer.weight, layer.bias, [1, 1], [0, 0], [1, 1], 1)
    torch.library.opcheck(
        torch.ops.weft.conv.default,
        tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments),
    )
