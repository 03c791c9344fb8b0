"""Pooling against PyTorch and float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import weft
import weft.functional as W
from harness import (
    DTYPES,
    LAYOUTS,
    check_against_native,
    check_deterministic,
    check_error_inputs,
    check_gradients,
    grid,
    module_info,
    op_samples,
    sliced,
)
from weft import _C
from weft.testing import cpu_target, host_execution

OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "max_pool2d": (W.max_pool2d, F.max_pool2d),
    "avg_pool2d": (W.avg_pool2d, F.avg_pool2d),
}
MODULES = [torch.nn.MaxPool2d, torch.nn.AvgPool2d]

each_op = pytest.mark.parametrize("name", OPS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_layout = pytest.mark.parametrize("layout", LAYOUTS[2], ids=str)


# ---- torch's own definitions ---------------------------------------------------------------------


@each_op
@each_dtype
def test_op_db_samples(name: str, dtype: torch.dtype, device: torch.device) -> None:
    weft_op, native = OPS[name]
    for sample in op_samples(f"nn.functional.{name}", device, dtype, grad=True):
        check_against_native(weft_op, native, sample.input, *sample.args, **sample.kwargs)


@each_op
def test_op_db_errors(name: str, device: torch.device) -> None:
    check_error_inputs(f"nn.functional.{name}", OPS[name][0], device)


@pytest.mark.parametrize("torch_class", MODULES)
def test_module_db(torch_class: type[torch.nn.Module], device: torch.device) -> None:
    info = module_info(torch_class)
    inputs = info.module_inputs_func(
        info, device=device, dtype=torch.float32, requires_grad=True, training=True
    )
    for case in inputs:
        native = torch_class(*case.constructor_input.args, **case.constructor_input.kwargs)
        module = weft.convert(copy.deepcopy(native))
        assert type(module) is getattr(weft.nn, torch_class.__name__)
        assert isinstance(module, torch_class)
        assert repr(module) == repr(native)
        args, kwargs = case.forward_input.args, case.forward_input.kwargs
        check_against_native(module, native, *args, **kwargs)
        assert type(weft.revert(module)) is torch_class


# ---- exact cases ---------------------------------------------------------------------------------


def test_worked_example(device: torch.device) -> None:
    x = torch.tensor([[1, 1, 2, 4], [5, 6, 7, 8], [3, 2, 1, 0], [1, 2, 3, 4]], dtype=torch.float32)
    y = W.max_pool2d(x.to(device)[None, None], 2, 2)
    assert y.squeeze().tolist() == [[6, 8], [3, 4]]


# Positions around every vector width, windows that overlap, touch and leave gaps.
WIDTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 65]
WINDOWS = [
    {"kernel_size": 1},
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": 2, "stride": 3, "ceil_mode": True},
    {"kernel_size": (2, 5), "stride": (1, 4), "padding": (1, 2), "ceil_mode": True},
    {"kernel_size": 7, "stride": 1, "padding": 3},
    {"kernel_size": (3, 17), "stride": (2, 1), "padding": (1, 8)},
]


@each_op
@each_layout
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_integers_are_exact(
    name: str, layout: torch.memory_format, window: dict, device: torch.device
) -> None:
    """Small integers sum exactly, so forward and backward equal torch's to the bit."""
    weft_op, native = OPS[name]
    extra = {"divisor_override": 4} if name == "avg_pool2d" else {}
    for width in WIDTHS:
        x = torch.randint(-8, 9, (2, 3, 9, width), device=device).float()
        x = x.contiguous(memory_format=layout).requires_grad_()
        try:
            expected = native(x, **window, **extra)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                weft_op(x, **window, **extra)
            continue
        actual = weft_op(x, **window, **extra)
        assert torch.equal(actual, expected)
        assert actual.is_contiguous(memory_format=layout)
        seed = torch.randint(-8, 9, expected.shape, device=device).float()
        (a,) = torch.autograd.grad(actual, x, seed)
        (e,) = torch.autograd.grad(expected, x, seed)
        assert torch.equal(a, e)
        assert a.is_contiguous(memory_format=layout)


@each_dtype
@each_layout
def test_indices(dtype: torch.dtype, layout: torch.memory_format, device: torch.device) -> None:
    """Indices of ties, NaN and infinities are torch's."""
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, 1.0])
    choice = torch.randint(0, len(special), (2, 20, 11, 23))
    x = special[choice].to(device, dtype).contiguous(memory_format=layout)
    for kwargs in grid(kernel_size=[2, 3], stride=[1, 2], padding=[0, 1], dilation=[1, 2]):
        y, indices = W.max_pool2d(x, **kwargs, return_indices=True)
        expected, expected_indices = F.max_pool2d(x, **kwargs, return_indices=True)
        assert torch.equal(indices, expected_indices)
        assert indices.dtype == torch.int64
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fill", [float("nan"), -float("inf"), float("inf")])
def test_uniform_windows(fill: float, device: torch.device) -> None:
    x = torch.full((1, 2, 9, 10), fill, device=device)
    for kwargs in grid(kernel_size=[3, 4], stride=[1, 2], padding=[0, 1], ceil_mode=[False, True]):
        actual = W.max_pool2d(x, **kwargs, return_indices=True)
        expected = F.max_pool2d(x, **kwargs, return_indices=True)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_large_windows_keep_wide_places(device: torch.device) -> None:
    """Over 256 elements a place no longer fits in a byte."""
    x = torch.randn(2, 3, 40, 41, device=device, requires_grad=True)
    for kernel_size in (16, 17, (3, 39)):
        padding = (kernel_size // 2 if isinstance(kernel_size, int) else 0,) * 2
        check_against_native(W.max_pool2d, F.max_pool2d, x, kernel_size, 1, padding)


def test_windows_that_meet_no_input(device: torch.device) -> None:
    """A dilated window can miss the map: −inf, and no gradient."""
    x = torch.randn(1, 1, 1, 5, device=device, requires_grad=True)
    y = W.max_pool2d(x, (2, 1), 1, (1, 0), dilation=(2, 1))
    assert torch.equal(y, torch.full((1, 1, 1, 5), -float("inf"), device=device))
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    assert torch.equal(grad, torch.zeros_like(x))


# ---- random problems -----------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, dict]:
    axis = st.tuples(*[st.integers(1, 6)] * 2)
    kernel, stride, dilation = draw(axis), draw(axis), draw(st.tuples(*[st.integers(1, 3)] * 2))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    # At least the dilation: torch's backward writes out of bounds if a window meets no input.
    extents = [
        draw(st.integers(max(d, d * (k - 1) + 1 - 2 * p), d * (k - 1) + 30))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    x = torch.randn(draw(st.integers(0, 3)), draw(st.integers(1, 20)), *extents)
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    window = {"kernel_size": kernel, "stride": stride, "padding": padding}
    return x, window | {"dilation": dilation, "ceil_mode": draw(st.booleans())}


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(problem=problems(), dtype=st.sampled_from(DTYPES), include=st.booleans())
def test_random_problems(
    problem: tuple[torch.Tensor, dict], dtype: torch.dtype, include: bool
) -> None:
    x, window = problem
    x = x.to(dtype).requires_grad_()
    for host in (False, True):
        _C.set_host_execution(host)
        try:
            check_against_native(W.max_pool2d, F.max_pool2d, x, **window)
            plain = {k: v for k, v in window.items() if k != "dilation"}
            check_against_native(W.avg_pool2d, F.avg_pool2d, x, **plain, count_include_pad=include)
        finally:
            _C.set_host_execution(False)


# ---- layouts and strides -------------------------------------------------------------------------


@each_op
@each_dtype
def test_strided_inputs(name: str, dtype: torch.dtype, device: torch.device) -> None:
    weft_op, native = OPS[name]
    x = torch.randn(2, 5, 12, 13, device=device, dtype=dtype, requires_grad=True)
    variants = [
        sliced(x),
        x.detach().transpose(2, 3).requires_grad_(),
        x.detach()[:, :1].expand(2, 5, 12, 13).requires_grad_(),
        x.detach().contiguous(memory_format=torch.channels_last)[:, 1:4].requires_grad_(),
        x.detach()[0].requires_grad_(),  # unbatched
    ]
    for variant in variants:
        check_against_native(weft_op, native, variant, 3, 2, 1)


@each_op
def test_empty_batch(name: str, device: torch.device) -> None:
    weft_op, native = OPS[name]
    x = torch.randn(0, 3, 8, 8, device=device, requires_grad=True)
    y = weft_op(x, 2)
    assert y.shape == native(x, 2).shape
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.shape == x.shape


# ---- derivatives ---------------------------------------------------------------------------------


@each_op
@each_layout
def test_gradients(name: str, layout: torch.memory_format, device: torch.device) -> None:
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64, device=device)
    x = x.contiguous(memory_format=layout).requires_grad_()
    weft_op = OPS[name][0]
    check_gradients(lambda t: weft_op(t, 2), x)
    check_gradients(lambda t: weft_op(t, 3, 2, 1, ceil_mode=True), x)
    if name == "max_pool2d":
        check_gradients(lambda t: weft_op(t, 2, 1, 1, dilation=2), x)
    else:
        check_gradients(lambda t: weft_op(t, 3, 2, 1, count_include_pad=False), x)
        check_gradients(lambda t: weft_op(t, 2, divisor_override=3), x)


@each_op
@each_layout
def test_deterministic(name: str, layout: torch.memory_format, device: torch.device) -> None:
    x = torch.randn(3, 5, 23, 29, device=device).contiguous(memory_format=layout).requires_grad_()
    weft_op = OPS[name][0]
    seed = torch.randn_like(weft_op(x, 3, 2, 1))

    def run() -> list[torch.Tensor]:
        y = weft_op(x, 3, 2, 1)
        return [y, *torch.autograd.grad(y, x, seed)]

    check_deterministic(run)


def test_max_pool_keeps_one_byte_per_output(device: torch.device) -> None:
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(2, 3, 16, 16, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = W.max_pool2d(x, 2)
    assert sum(t.untyped_storage().nbytes() for t in kept) == y.numel()


# ---- dispatcher ----------------------------------------------------------------------------------


def test_opcheck(device: torch.device) -> None:
    ops = torch.ops.weft
    window = [[3, 3], [2, 2], [1, 1], [1, 1], False]
    average = [[3, 3], [2, 2], [1, 1], False, False, None]
    for layout in LAYOUTS[2]:
        x = torch.randn(2, 3, 9, 8, device=device).contiguous(memory_format=layout)
        y, places = ops.max_pool(x, *window, True)
        last = layout is torch.channels_last
        cases = [
            (ops.max_pool, (x, *window, True)),
            (ops.max_pool, (x, *window, False)),
            (ops.max_pool_backward, (torch.randn_like(y), places, x.shape, *window, last)),
            (ops.max_pool_pick, (x, places, *window)),
            (ops.max_pool_indices, (places, x.shape, *window)),
            (ops.avg_pool, (x, *average)),
            (ops.avg_pool_backward, (torch.randn_like(y), x.shape, *average, last)),
        ]
        for op, args in cases:
            torch.library.opcheck(op.default, args)


@each_op
def test_compile(name: str, device: torch.device) -> None:
    weft_op = OPS[name][0]
    compiled = torch.compile(lambda t: weft_op(t, 3, 2, 1), fullgraph=True, backend="aot_eager")
    for layout in LAYOUTS[2]:
        x = torch.randn(2, 3, 9, 8, device=device).contiguous(memory_format=layout).requires_grad_()
        y = compiled(x)
        expected = weft_op(x, 3, 2, 1)
        assert torch.equal(y, expected)
        assert y.stride() == expected.stride()
        (a,) = torch.autograd.grad(y.sin().sum(), x)
        (e,) = torch.autograd.grad(expected.sin().sum(), x)
        assert torch.equal(a, e)


@each_op
def test_torch_func(name: str, device: torch.device) -> None:
    weft_op, native = OPS[name]
    x = torch.randn(3, 2, 8, 8, device=device)

    def per_sample(op: Callable[..., torch.Tensor]) -> torch.Tensor:
        def loss(sample: torch.Tensor) -> torch.Tensor:
            return op(sample[None], 3, 2, 1).sin().sum()

        return torch.func.vmap(torch.func.grad(loss))(x)

    torch.testing.assert_close(per_sample(weft_op), per_sample(native))


@each_op
def test_autocast_keeps_the_dtype(name: str, device: torch.device) -> None:
    weft_op, native = OPS[name]
    x = torch.randn(1, 2, 8, 8, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert weft_op(x, 2).dtype == native(x, 2).dtype
        assert weft_op(x.bfloat16(), 2).dtype == native(x.bfloat16(), 2).dtype


# ---- instruction sets and traffic ----------------------------------------------------------------


@pytest.mark.parametrize("target", _C.available_cpu_targets())
@each_dtype
@each_layout
def test_every_cpu_target(target: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.randn(2, 17, 19, 37).to(dtype).contiguous(memory_format=layout).requires_grad_()
    with cpu_target(target):
        assert _C.cpu_target() == target
        for kernel, stride, padding in [(2, 2, 0), (3, 2, 1), (3, 1, 1), (7, 3, 3)]:
            check_against_native(W.max_pool2d, F.max_pool2d, x, kernel, stride, padding)
            check_against_native(W.avg_pool2d, F.avg_pool2d, x, kernel, stride, padding)


@each_layout
def test_traffic_of_touching_windows_is_minimal(layout: torch.memory_format) -> None:
    """Windows that do not overlap read the input once and write the output once."""
    x = torch.randn(2, 8, 32, 32).contiguous(memory_format=layout)
    with host_execution() as run:
        y = W.max_pool2d(x, 2)
    (launch,) = run.launches
    assert launch.kernel == "max_pool_forward"
    assert launch.bytes_stored == y.nbytes
    assert launch.traffic <= 1.25 * (x.nbytes + y.nbytes)


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


@each_op
@pytest.mark.parametrize(("shape", "kwargs", "text"), BAD_ARGUMENTS, ids=str)
def test_bad_arguments(
    name: str, shape: tuple[int, ...], kwargs: dict, text: str, device: torch.device
) -> None:
    with pytest.raises(RuntimeError, match=text):
        OPS[name][0](torch.randn(shape, device=device), **kwargs)


@each_op
def test_integer_input(name: str, device: torch.device) -> None:
    with pytest.raises(NotImplementedError, match="float32, float64, bfloat16 or float16"):
        OPS[name][0](torch.ones(1, 1, 4, 4, dtype=torch.int64, device=device), 2)


def test_zero_divisor(device: torch.device) -> None:
    with pytest.raises(RuntimeError, match="divisor must be not zero"):
        W.avg_pool2d(torch.ones(1, 1, 4, 4, device=device), 2, divisor_override=0)
