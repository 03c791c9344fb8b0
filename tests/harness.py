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


def cast(value: Any, dtype: torch.dtype) -> Any:
    """`value` with every floating tensor in it as a detached leaf of `dtype`."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return leaf.detach().to(dtype, copy=True).requires_grad_(leaf.requires_grad)

    return tree_map(convert, value)


def _finite(tensor: Tensor) -> Tensor:
    return tensor.double().where(tensor.isfinite(), 0)


def assert_as_accurate(
    actual: Tensor, native: Tensor, exact: Tensor, native_error: float | None = None
) -> None:
    """|actual − exact| ≤ max(1.5 · PyTorch's largest error, 1 ulp); non-finite places equal.

    Where `exact` is PyTorch's own float64 result, its error must be given.
    """
    assert actual.shape == native.shape
    assert actual.dtype == native.dtype
    if actual.numel() == 0:
        return
    torch.testing.assert_close(
        actual.where(~native.isfinite(), 0),
        native.where(~native.isfinite(), 0),
        rtol=0,
        atol=0,
        equal_nan=True,
    )
    both = native.isfinite() & exact.isfinite()
    error = _finite(actual.double() - exact).where(both, 0).abs()
    if native_error is None:
        bound = 1.5 * _finite(native.double() - exact).where(both, 0).abs().max()
    else:
        bound = torch.tensor(2.5 * native_error, dtype=torch.float64, device=exact.device)
    finfo = torch.finfo(actual.dtype)
    bounds = torch.maximum(bound, finfo.eps * _finite(exact).abs() + finfo.tiny)
    worst = (error - bounds).argmax()
    assert (error <= bounds).all(), (
        f"error {error.flatten()[worst]:.3e} exceeds {bounds.flatten()[worst]:.3e}"
    )


def _tensors(value: Any) -> list[Tensor]:
    flat = torch.utils._pytree.tree_leaves(value)
    return [t for t in flat if isinstance(t, Tensor) and t.is_floating_point()]


def _values_and_gradients(
    function: Callable[..., Any], args: tuple, kwargs: dict, seeds: list[Tensor] | None
) -> tuple[list[Tensor], list[Tensor | None]]:
    outputs = _tensors(function(*args, **kwargs))
    inputs = [t for t in _tensors((args, kwargs)) if t.requires_grad]
    if seeds is None or not inputs or not any(t.requires_grad for t in outputs):
        return outputs, []
    pairs = [(t, s.to(t.dtype)) for t, s in zip(outputs, seeds, strict=True) if t.requires_grad]
    grads = torch.autograd.grad(
        [t for t, _ in pairs], inputs, [s for _, s in pairs], allow_unused=True
    )
    return outputs, list(grads)


def _native_double_errors(
    native: Callable[..., Any], args: tuple, kwargs: dict, seeds: list[Tensor]
) -> list[float | None]:
    """PyTorch's error in float64, per output and gradient.

    It is its error in float32, scaled by the ratio of the two epsilons: the largest of four draws
    of values near the given ones, since a small tensor may round luckily.
    """
    scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    draws = []
    single_seeds = [s.float() for s in seeds]
    for _ in range(4):
        near = tree_map(
            lambda t: (
                (t * (1 + torch.rand_like(t) / 4)).detach().requires_grad_(t.requires_grad)
                if isinstance(t, Tensor) and t.is_floating_point()
                else t
            ),
            (args, kwargs),
        )
        single_args, single_kwargs = cast(near, torch.float32)
        single = _values_and_gradients(native, single_args, single_kwargs, single_seeds)
        exact = _values_and_gradients(
            native, *cast((single_args, single_kwargs), torch.float64), single_seeds
        )
        draws.append(
            [
                None
                if a is None or b is None or a.numel() == 0
                else float(_finite(a.detach().double() - b.detach()).abs().max()) * scale
                for a, b in zip(single[0] + single[1], exact[0] + exact[1], strict=True)
            ]
        )
    return [None if e[0] is None else max(e) for e in zip(*draws, strict=True)]


def check_against_native(
    weft: Callable[..., Any], native: Callable[..., Any], *args: Any, **kwargs: Any
) -> None:
    """Values, and gradients of every floating tensor that requires one, of weft(*args, **kwargs).

    For float64 there is no exact reference but PyTorch itself, see `_native_double_errors`.
    """
    double = torch.float64
    outputs = _tensors(weft(*args, **kwargs))
    seeds = [torch.randn_like(t) for t in outputs]
    actual = _values_and_gradients(weft, args, kwargs, seeds)
    expected = _values_and_gradients(native, args, kwargs, seeds)
    exact = _values_and_gradients(native, *cast((args, kwargs), double), seeds)
    errors: list[float | None] = [None] * (len(exact[0]) + len(exact[1]))
    if any(t.dtype == double for t in outputs):
        errors = _native_double_errors(native, args, kwargs, seeds)
    for a, n, e, error in zip(
        actual[0] + actual[1], expected[0] + expected[1], exact[0] + exact[1], errors, strict=True
    ):
        assert (a is None) == (n is None)
        if a is not None and n is not None and e is not None:
            assert_as_accurate(a, n, e, error)


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
