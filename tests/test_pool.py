"""Pooling against PyTorch and float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import weft.functional as W
from harness import (
    DTYPES,
    check_against_native,
    check_error_inputs,
    op_samples,
)

OPS = {"nn.functional.max_pool2d": W.max_pool2d, "nn.functional.avg_pool2d": W.avg_pool2d}
NATIVE = {"nn.functional.max_pool2d": F.max_pool2d, "nn.functional.avg_pool2d": F.avg_pool2d}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_op_db_samples(name: str, dtype: torch.dtype, device: torch.device) -> None:
    for sample in op_samples(name, device, dtype, grad=True):
        check_against_native(OPS[name], NATIVE[name], sample.input, *sample.args, **sample.kwargs)


@pytest.mark.parametrize("name", OPS)
def test_op_db_errors(name: str, device: torch.device) -> None:
    check_error_inputs(name, OPS[name], device)
