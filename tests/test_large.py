"""Tensors of more than 2^31 elements, where memory allows: offsets are 64 bits wide."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import weft.functional as W

_SIDE = 46342  # its square is over 2^31
_EDGE = 32  # rows at either end that are not zero
_BYTES = 14 << 30  # input, output and gradient, in two bytes an element, and room


def _available() -> int:
    with open("/proc/meminfo") as lines:
        values = dict(line.split(":") for line in lines)
    return int(values["MemAvailable"].split()[0]) * 1024


pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/meminfo") or _available() < _BYTES,
    reason=f"needs {_BYTES >> 30} GiB of memory",
)


ENDS = [slice(0, _EDGE), slice(_SIDE - _EDGE, _SIDE)]


@pytest.fixture(scope="module")
def large() -> Tensor:
    x = torch.zeros(1, 1, _SIDE, _SIDE, dtype=torch.bfloat16)
    for rows in ENDS:
        x[:, :, rows] = torch.randint(-8, 8, (1, 1, _EDGE, _SIDE)).bfloat16()
    return x.requires_grad_()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda x: W.max_pool2d(x, 2), lambda x: F.max_pool2d(x, 2)),
        (lambda x: W.avg_pool2d(x, 2), lambda x: F.avg_pool2d(x, 2)),
        (
            lambda x: W.conv2d(x, x.new_full((1, 1, 2, 2), 0.5), stride=2),
            lambda x: F.conv2d(x, x.new_full((1, 1, 2, 2), 0.5), stride=2),
        ),
    ],
    ids=["max_pool2d", "avg_pool2d", "conv2d"],
)
def test_more_elements_than_32_bits_count(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], large: Tensor
) -> None:
    """Both ends of a map, forward and backward, are those of the ends alone."""
    y = ours(large)
    (gx,) = torch.autograd.grad(y, large, torch.ones((), dtype=y.dtype).expand_as(y))
    half = _EDGE // 2
    for rows, outputs in zip(ENDS, [slice(0, half), slice(_SIDE // 2 - half, None)], strict=True):
        part = large.detach()[:, :, rows].float().requires_grad_()
        expected = theirs(part)
        (expected_gx,) = torch.autograd.grad(expected, part, torch.ones_like(expected))
        assert torch.equal(y[:, :, outputs], expected.bfloat16())
        assert torch.equal(gx[:, :, rows], expected_gx.bfloat16())
