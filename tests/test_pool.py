"""Pooling against PyTorch and float64."""

from __future__ import annotations

import copy
from functools import partial
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
    check_against_native,
    check_deterministic,
    check_error_inputs,
    check_gradients,
    grid,
    module_info,
    op_info,
    op_samples,
    sliced,
)
from pool_cases import (
    ADAPTIVE,
    MODULES,
    OPS,
    each_adaptive,
    each_dtype,
    each_last,
    each_layout,
    each_max,
    each_op,
    each_plane,
    in_layout,
    random_map,
    rank_of,
    window_of,
)
from weft import _C
from weft.testing import cpu_target, host_execution

# ---- torch's own definitions ---------------------------------------------------------------------


@each_op
@each_dtype
def test_op_db_samples(name: str, dtype: torch.dtype, device: torch.device) -> None:
    weft_op, native = OPS[name]
    for sample in op_samples(f"nn.functional.{name}", device, dtype, grad=True):
        check_against_native(weft_op, native, sample.input, *sample.args, **sample.kwargs)
        if sample.kwargs.get("return_indices"):
            _, found = weft_op(sample.input, *sample.args, **sample.kwargs)
            _, expected = native(sample.input, *sample.args, **sample.kwargs)
            assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "name", [n for n in OPS if op_info(f"nn.functional.{n}").error_inputs_func]
)
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


@each_plane
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


UNEVEN_WINDOWS = [
    {"kernel_size": (1, 2, 2), "stride": (1, 2, 2)},
    {"kernel_size": (2, 3, 5), "stride": (1, 2, 4), "padding": (1, 1, 2), "ceil_mode": True},
    {"kernel_size": (3, 1, 4), "stride": (2, 3, 1), "padding": (0, 0, 1)},
]
UNEVEN_SIZES = [{"output_size": size} for size in ((2, 3, 4), (1, 8, 1), (6, 1, 17), (3, 1, 1))]


@each_op
@each_last
def test_uneven_axes(name: str, last: bool, device: torch.device) -> None:
    """Windows that differ from axis to axis; maxima, and means by one division, are exact."""
    weft_op, native = OPS[name]
    rank = rank_of(name)
    for arguments in UNEVEN_SIZES if name in ADAPTIVE else UNEVEN_WINDOWS:
        window = {k: v[-rank:] if isinstance(v, tuple) else v for k, v in arguments.items()}
        for width in (7, 16, 33):
            x = torch.randint(-8, 9, (2, 3, *(4, 6, width)[-rank:]), device=device).float()
            x = in_layout(x, rank, last).requires_grad_()
            expected, actual = native(x, **window), weft_op(x, **window)
            if name.startswith("adaptive_avg"):  # torch divides once an axis
                check_against_native(weft_op, native, x, **window)
            else:
                assert torch.equal(actual, expected)
            assert in_layout(actual, rank, last).stride() == actual.stride()
            seed = torch.randint(-8, 9, expected.shape, device=device).float()
            (grad,) = torch.autograd.grad(actual, x, seed)
            if "max" in name:
                assert torch.equal(grad, torch.autograd.grad(expected, x, seed)[0])
            assert grad.stride() == x.stride()


@each_max
@each_last
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_width(name: str, last: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Rows, columns and channels around each vector width.

    A maximum has torch's bits, and so has its gradient, where small integers are added up.
    """
    weft_op, native = OPS[name]
    rank = rank_of(name)
    windows: list[tuple[int, ...]] = [(1,), (2,)] if name in ADAPTIVE else [(1, 2), (3, 1, 1)]
    for width in (1, 2, 15, 16, 17, 31, 32, 33, 64, 65):
        channels, row = (width, 3) if last and rank > 1 else (2, width)
        for extents in ((1, 1, row), (2, row, 1), (2, 3, row)):
            x = torch.randint(-8, 9, (1, channels, *extents[-rank:]), device=device)
            x = in_layout(x.to(dtype), rank, last).requires_grad_()
            for window in windows:
                expected, actual = native(x, *window), weft_op(x, *window)
                assert torch.equal(actual, expected)
                seed = torch.randint(-2, 3, expected.shape, device=device).to(dtype)
                (a,) = torch.autograd.grad(actual, x, seed)
                (e,) = torch.autograd.grad(expected, x, seed)
                assert torch.equal(a, e)


SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, 1.0]


@each_max
@each_last
def test_indices_of_ties_and_nan(name: str, last: bool, device: torch.device) -> None:
    weft_op, native = OPS[name]
    rank = rank_of(name)
    if name in ADAPTIVE:
        windows = [(size[-rank:],) for size in ((1, 1, 1), (2, 3, 5), (2, 1, 1), (3, 7, 40))]
    else:
        windows = [(2,), (3, 2, 1)]
    for drawn in (SPECIAL, SPECIAL[1:], SPECIAL[2:3], SPECIAL[:1]):
        values = torch.tensor(drawn)
        choice = torch.randint(0, len(values), (2, 17, *(4, 9, 23)[-rank:]))
        x = in_layout(values[choice].to(device), rank, last)
        for window in windows:
            y, indices = weft_op(x, *window, return_indices=True)
            # torch's channels-last kernels lose the first place of windows of -inf.
            expected = native(x.contiguous(), *window, return_indices=True)
            assert torch.equal(indices, expected[1])
            assert indices.dtype == torch.int64
            torch.testing.assert_close(y, expected[0], rtol=0, atol=0, equal_nan=True)


@each_adaptive
@each_last
def test_global_pooling(name: str, last: bool, device: torch.device) -> None:
    weft_op, native = OPS[name]
    for extents in ((1, 1, 1), (2, 3, 3), (3, 7, 7), (4, 13, 17), (2, 40, 61)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(2, 3, *extents[-rank_of(name) :], device=device, dtype=dtype)
            x = in_layout(x, rank_of(name), last).requires_grad_()
            check_against_native(weft_op, native, x, 1)


def test_sizes_of_the_input_and_none(device: torch.device) -> None:
    x = torch.randn(2, 3, 5, 6, device=device)
    for size in ((None, 2), (3, None), [None, None], (5, 6)):
        assert torch.equal(W.adaptive_max_pool2d(x, size), F.adaptive_max_pool2d(x, size))
        check_against_native(W.adaptive_avg_pool2d, F.adaptive_avg_pool2d, x, size)


@each_adaptive
def test_no_outputs(name: str, device: torch.device) -> None:
    weft_op, native = OPS[name]
    x = random_map(name, 2, 3).to(device).requires_grad_()
    y = weft_op(x, 0)
    assert y.shape == native(x, 0).shape
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.zeros_like(x))


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


@settings(max_examples=30, deadline=None, database=None, derandomize=True)
@given(data=st.data(), rank=st.integers(1, 3), dtype=st.sampled_from(DTYPES), last=st.booleans())
def test_random_adaptive_problems(
    data: st.DataObject, rank: int, dtype: torch.dtype, last: bool
) -> None:
    extents = data.draw(st.tuples(*[st.integers(1, 40 // rank**2)] * rank))
    output_size = data.draw(st.tuples(*[st.integers(1, 20 // rank)] * rank))
    x = torch.randn(data.draw(st.integers(0, 2)), data.draw(st.integers(1, 20)), *extents)
    x = in_layout(x.to(dtype), rank, last).requires_grad_()
    for host in (False, True):
        _C.set_host_execution(host)
        try:
            for name in (n for n in ADAPTIVE if rank_of(n) == rank):
                check_against_native(*OPS[name], x, output_size)
        finally:
            _C.set_host_execution(False)


# ---- layouts and strides -------------------------------------------------------------------------


@each_op
@each_dtype
def test_strided_inputs(name: str, dtype: torch.dtype, device: torch.device) -> None:
    weft_op, native = OPS[name]
    x = random_map(name, 2, 5).to(device, dtype).requires_grad_()
    d = x.detach()
    variants = [
        sliced(x),
        d.transpose(-2, -1).contiguous().transpose(-2, -1).requires_grad_(),
        d[:, :1].expand(x.shape).requires_grad_(),
        in_layout(d, rank_of(name), True)[:, 1:4].requires_grad_(),
        d[0].requires_grad_(),  # unbatched
    ]
    for variant in variants:
        check_against_native(weft_op, native, variant, *window_of(name))


def test_unbatched_maps_have_no_channels_last_form(device: torch.device) -> None:
    """[C, D, H, W] laid out as a channels-last [N, C, H, W] is not."""
    x = torch.randn(3, 4, 6, 6, device=device).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    expected = F.max_pool3d(x.contiguous(), 2)
    actual = W.max_pool3d(x, 2)
    assert torch.equal(actual, expected)
    (a,) = torch.autograd.grad(actual.sin().sum(), x)
    (e,) = torch.autograd.grad(expected.sin().sum(), x)
    assert torch.equal(a, e)


@each_op
def test_empty_batch(name: str, device: torch.device) -> None:
    weft_op, native = OPS[name]
    x = random_map(name, 0, 3).to(device).requires_grad_()
    y = weft_op(x, 2)
    assert y.shape == native(x, 2).shape
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.shape == x.shape


# ---- derivatives ---------------------------------------------------------------------------------


@each_op
@each_last
def test_gradients(name: str, last: bool, device: torch.device) -> None:
    weft_op, rank = OPS[name][0], rank_of(name)
    # Distinct values, far apart: a maximum among near equals has no derivative.
    shape = (1, 2, *(3, 3, 4)[-rank:])
    x = torch.randperm(torch.Size(shape).numel()).double().reshape(shape).to(device) / 7
    x = in_layout(x, rank, last).requires_grad_()
    if name in ADAPTIVE:
        options: list[dict[str, Any]] = [{"output_size": 1}, {"output_size": (2, 3, 3)[-rank:]}]
    else:
        options = [
            {"kernel_size": 2},
            {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
        ]
        if name.startswith("max"):
            options.append({"kernel_size": 2, "stride": 1, "padding": 1, "dilation": 2})
        else:
            window = {"kernel_size": 3, "stride": 2, "padding": 1}
            options.append(window | {"count_include_pad": False})
            options += [{"kernel_size": 2, "divisor_override": 3}] if rank > 1 else []
    for kwargs in options:
        check_gradients(partial(weft_op, **kwargs), x)


@each_op
@each_last
def test_deterministic(name: str, last: bool, device: torch.device) -> None:
    rank = rank_of(name)
    x = in_layout(random_map(name, 3, 5, extents=(4, 23, 29)), rank, last)
    x = x.to(device).requires_grad_()
    weft_op = OPS[name][0]
    seed = torch.randn_like(weft_op(x, *window_of(name)))

    def run() -> list[torch.Tensor]:
        y = weft_op(x, *window_of(name))
        return [y, *torch.autograd.grad(y, x, seed)]

    check_deterministic(run)


@each_max
def test_max_pool_keeps_one_byte_per_output(name: str, device: torch.device) -> None:
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x = random_map(name, 2, 3).to(device).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = OPS[name][0](x, *window_of(name))
    assert sum(t.untyped_storage().nbytes() for t in kept) == y.numel()


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
        for size in (1, (1, 7), (4, 1), (5, 40)):
            check_against_native(W.adaptive_max_pool2d, F.adaptive_max_pool2d, x, size)
            check_against_native(W.adaptive_avg_pool2d, F.adaptive_avg_pool2d, x, size)


@each_adaptive
@each_last
@pytest.mark.parametrize("output_size", [1, 4])
def test_traffic_of_adaptive_windows_is_minimal(name: str, last: bool, output_size: int) -> None:
    x = in_layout(random_map(name, 2, 32, extents=(8, 16, 16)), rank_of(name), last)
    with host_execution() as run:
        y = OPS[name][0](x, output_size)
    (launch,) = run.launches
    assert launch.bytes_loaded == x.nbytes
    assert launch.bytes_stored == y.nbytes
    assert launch.traffic <= 1.25 * (x.nbytes + y.nbytes)


@each_layout
def test_traffic_of_touching_windows_is_minimal(layout: torch.memory_format) -> None:
    """Windows that do not overlap read the input once and write the output once."""
    x = torch.randn(2, 8, 32, 32).contiguous(memory_format=layout)
    with host_execution() as run:
        y = W.max_pool2d(x, 2)
    (launch,) = run.launches
    assert launch.kernel == "max_pool_tile"
    assert launch.bytes_stored == y.nbytes
    assert launch.traffic <= 1.25 * (x.nbytes + y.nbytes)
