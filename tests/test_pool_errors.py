"""Pooling of bad input: torch's exception types, with a sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import weft.functional as W
from pool_cases import OPS, each_adaptive, each_op, each_plane, random_map, rank_of

# ---- bad input -----------------------------------------------------------------------------------


BAD_ARGUMENTS = [
    ((2, 3, 8, 8), {"kernel_size": 0}, "kernel size"),
    ((2, 3, 8, 8), {"kernel_size": 2, "stride": 0}, "stride"),
    ((2, 3, 8, 8), {"kernel_size": 2, "padding": 2}, "at most half"),
    ((2, 3, 8, 8), {"kernel_size": 2, "padding": -1}, "non-negative"),
    ((2, 3, 8, 8), {"kernel_size": 9}, "too small"),
    ((2, 3, 8, 8), {"kernel_size": (2, 2, 2)}, "2"),
    ((2, 3, 8, 8), {"kernel_size": 2, "stride": (2, 2, 2)}, "stride"),
    ((8, 8), {"kernel_size": 2}, "Expected 3D or 4D"),
    ((2, 3, 0, 8), {"kernel_size": 2}, "non-zero size"),
    ((2, 3, 8, 8), {"kernel_size": 2**31}, "out of range"),
    ((2, 3, 8, 8), {"kernel_size": 2, "stride": 2**40}, "out of range"),
    ((2, 3, 8, 8), {"kernel_size": (2**20, 2**20)}, "out of range"),
]


@each_plane
@pytest.mark.parametrize(("shape", "kwargs", "text"), BAD_ARGUMENTS, ids=str)
def test_bad_arguments(
    name: str, shape: tuple[int, ...], kwargs: dict, text: str, device: torch.device
) -> None:
    with pytest.raises(RuntimeError, match=text):
        OPS[name][0](torch.randn(shape, device=device), **kwargs)


@each_adaptive
@pytest.mark.parametrize("size", [-1, (2, 2, 2, 2), (2, None, -3, 1), 2**31], ids=str)
def test_bad_output_sizes(name: str, size: Any, device: torch.device) -> None:
    with pytest.raises(RuntimeError, match=f"{name}: .*output_size"):
        OPS[name][0](random_map(name, 2, 3).to(device), size)


@each_op
def test_wrong_rank_and_empty_maps(name: str, device: torch.device) -> None:
    weft_op, rank = OPS[name][0], rank_of(name)
    for dims in (rank, rank + 3):
        with pytest.raises(RuntimeError, match=f"{name}: Expected {rank + 1}D or {rank + 2}D"):
            weft_op(torch.ones([2] * dims, device=device), 1)
    with pytest.raises(RuntimeError, match=f"{name}: .*non-zero size"):
        weft_op(torch.ones([2] * (rank + 1) + [0], device=device), 1)


@each_op
def test_integer_input(name: str, device: torch.device) -> None:
    with pytest.raises(NotImplementedError, match="float32, float64, bfloat16 or float16"):
        OPS[name][0](random_map(name, 1, 1).to(device, torch.int64), 2)


def test_zero_divisor(device: torch.device) -> None:
    with pytest.raises(RuntimeError, match="divisor must be not zero"):
        W.avg_pool2d(torch.ones(1, 1, 4, 4, device=device), 2, divisor_override=0)
