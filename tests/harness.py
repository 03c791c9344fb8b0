"""What every family's tests share: samples from torch's own definitions, and how to compare.

How numbers are judged stands in `weft.testing`, where `python -m weft check` finds it as well.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.utils._python_dispatch import TorchDispatchMode

from weft.testing import assert_as_accurate as assert_as_accurate
from weft.testing import cast as cast
from weft.testing import check_against_native as check_against_native
from weft.testing import check_deterministic as check_deterministic

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = {2: [torch.contiguous_format, torch.channels_last]}


class Seen(TorchDispatchMode):
    """The ops that the dispatcher runs inside, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def op_info(name: str) -> Any:
    """torch's own OpInfo of e.g. "nn.functional.max_pool2d"."""
    (info,) = (op for op in op_db if op.name == name and op.variant_test_name == "")
    return info


def op_samples(name: str, device: torch.device, dtype: torch.dtype, grad: bool) -> Iterator[Any]:
    """torch's own sample inputs; each has `.input`, `.args`, `.kwargs`."""
    yield from op_info(name).sample_inputs(str(device), dtype, requires_grad=grad)


def module_info(torch_class: type[torch.nn.Module]) -> Any:
    (info,) = (m for m in module_db if m.module_cls is torch_class)
    return info


def check_error_inputs(name: str, weft: Callable[..., Any], device: torch.device) -> None:
    """weft raises what torch raises: the exception's type for each of op_db's error inputs."""
    count = 0
    for case in op_info(name).error_inputs(str(device)):
        sample = case.sample_input
        with pytest.raises(case.error_type, match=re.compile(r"\S")):
            weft(sample.input, *sample.args, **sample.kwargs)
        count += 1
    assert count > 0


def check_gradients(function: Callable[..., Any], *inputs: Any) -> None:
    """gradcheck and gradgradcheck in float64."""
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def check_exact_gradients(
    actual: Tensor,
    expected: Tensor,
    leaves: Sequence[Tensor],
    doubles: Sequence[Tensor],
    seed: Tensor,
) -> None:
    """The gradients of `actual` in `leaves` are those of float64, bit for bit."""
    gradients = torch.autograd.grad(actual, leaves, seed.to(actual.dtype))
    exact = torch.autograd.grad(expected, doubles, seed.double())
    for got, want in zip(gradients, exact, strict=True):
        assert torch.equal(got, want.to(got.dtype))


def sliced(tensor: Tensor) -> Tensor:
    """Equal values, strides of a slice: neither contiguous nor aligned."""
    padded = torch.zeros([s + 3 for s in tensor.shape], dtype=tensor.dtype, device=tensor.device)
    view = padded[tuple(slice(1, 1 + s) for s in tensor.shape)]
    return view.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)


def grid(**axes: Sequence[Any]) -> list[dict[str, Any]]:
    """All combinations of keyword values."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
