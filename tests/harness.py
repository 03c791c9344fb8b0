"""What every family's tests share: samples from torch's own definitions, and how to compare.

Errors are measured against float64 and judged against PyTorch's own error on the same input, so no
test holds a tolerance of its own.
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
from torch.utils._pytree import tree_map

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = {2: [torch.contiguous_format, torch.channels_last]}


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


def to_double(value: Any) -> Any:
    """`value` with every floating tensor in it as a detached float64 leaf."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return leaf.detach().double().requires_grad_(leaf.requires_grad)

    return tree_map(convert, value)


def assert_as_accurate(actual: Tensor, native: Tensor, exact: Tensor) -> None:
    """|actual − exact| ≤ max(1.5 · PyTorch's largest error, 1 ulp); non-finite places equal."""
    assert actual.shape == native.shape
    assert actual.dtype == native.dtype
    if actual.numel() == 0:
        return
    finite = exact.isfinite() & native.isfinite()
    torch.testing.assert_close(
        actual.where(~finite, 0), native.where(~finite, 0), rtol=0, atol=0, equal_nan=True
    )
    error = (actual.double() - exact).where(finite, 0).abs()
    native_error = (native.double() - exact).where(finite, 0).abs().max()
    ulp = torch.finfo(actual.dtype).eps * exact.where(finite, 0).abs()
    tiny = torch.finfo(actual.dtype).tiny
    bound = torch.maximum(1.5 * native_error, ulp + tiny)
    worst = (error - bound).argmax()
    assert (error <= bound).all(), (
        f"error {error.flatten()[worst]:.3e} exceeds {bound.flatten()[worst]:.3e} "
        f"(torch's largest error: {native_error:.3e})"
    )


def _tensors(value: Any) -> list[Tensor]:
    flat = torch.utils._pytree.tree_leaves(value)
    return [t for t in flat if isinstance(t, Tensor) and t.is_floating_point()]


def check_against_native(
    weft: Callable[..., Any], native: Callable[..., Any], *args: Any, **kwargs: Any
) -> None:
    """Values, and gradients of every floating tensor that requires one, of weft(*args, **kwargs)."""
    exact_args, exact_kwargs = to_double((args, kwargs))
    results = [
        weft(*args, **kwargs),
        native(*args, **kwargs),
        native(*exact_args, **exact_kwargs),
    ]
    outputs = [_tensors(r) for r in results]
    for actual, expected, exact in zip(*outputs, strict=True):
        assert_as_accurate(actual, expected, exact)
    inputs = [t for t in _tensors((args, kwargs)) if t.requires_grad]
    exact_inputs = [t for t in _tensors((exact_args, exact_kwargs)) if t.requires_grad]
    if not inputs or not outputs[0][0].requires_grad:
        return
    seeds = [torch.randn_like(t) for t in outputs[0]]
    exact_seeds = [s.double() for s in seeds]
    gradients = [
        torch.autograd.grad(outputs[0], inputs, seeds, allow_unused=True),
        torch.autograd.grad(outputs[1], inputs, seeds, allow_unused=True),
        torch.autograd.grad(outputs[2], exact_inputs, exact_seeds, allow_unused=True),
    ]
    for actual, expected, exact in zip(*gradients, strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            assert_as_accurate(actual, expected, exact)


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


def check_deterministic(function: Callable[[], Any]) -> None:
    """Equal bits from two runs and from 1, 2 and 3 threads."""
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (threads, threads, 1, 2, 3):
            torch.set_num_threads(count)
            results.append(_tensors(function()))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def sliced(tensor: Tensor) -> Tensor:
    """Equal values, strides of a slice: neither contiguous nor aligned."""
    padded = torch.zeros([s + 3 for s in tensor.shape], dtype=tensor.dtype, device=tensor.device)
    view = padded[tuple(slice(1, 1 + s) for s in tensor.shape)]
    return view.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)


def grid(**axes: Sequence[Any]) -> list[dict[str, Any]]:
    """All combinations of keyword values."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
