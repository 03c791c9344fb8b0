"""All gradients of a convolution in one op, which depthwise kernels on CPU fuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import weft.functional as W
from harness import DTYPES, check_against_native, check_deterministic
from weft import _C
from weft.conv_ops import ConvWindow, conv_activated
from weft.testing import cpu_target

LAST = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}
Case = tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]]

# Size, window extents, (stride, padding, dilation): small windows and larger ones, phases of a
# stride and positions that none meets, bands of rows, planes that are held together, parts of
# either map that are empty.
CASES: dict[str, Case] = {
    "small": ((3, 5, 9, 37), (3, 3), (1, 1, 1)),
    "bands": ((2, 3, 90, 140), (3, 3), (1, 1, 1)),
    "strided": ((2, 5, 18, 19), (3, 3), (2, 1, 1)),
    "strided_bands": ((1, 2, 150, 131), (3, 3), (2, 1, 1)),
    "pairs": ((2, 3, 13, 75), (2, 2), (2, (0, 1), 1)),
    "pairs_of_four": ((3, 2, 140, 70), (4, 4), (2, (2, 1), 1)),
    "pairs_over_padded": ((1, 3, 5, 6), (3, 3), (2, (3, 4), 1)),
    "short_rows": ((2, 3, 15, 9), (5, 5), (1, (2, 1), 1)),
    "short_rows_tall": ((2, 3, 11, 14), (3, 3), (1, 1, 1)),
    "short_rows_over_padded": ((1, 3, 5, 4), (3, 3), (1, (1, 3), 1)),
    "flat": ((2, 18, 12, 17), (2, 3), ((3, 2), (1, 0), 1)),
    "gaps": ((2, 3, 11, 17), (2, 2), (5, 1, 1)),
    "dilated": ((2, 4, 13, 21), (3, 2), (1, 2, (2, 3))),
    "large": ((9, 17, 7, 7), (7, 7), (1, 3, 1)),
    "many_images": ((8, 16, 14, 14), (5, 5), (1, 2, 1)),
    "wide_window": ((2, 3, 6, 20), (4, 5), (1, 2, 1)),
    "over_padded": ((1, 3, 5, 4), (1, 2), (1, (4, 3), 1)),
    "shrinking": ((2, 3, 12, 11), (9, 8), (1, 0, 1)),
    "line": ((2, 6, 70), (4,), (1, 3, 1)),
    "volume": ((2, 3, 4, 9, 10), (3, 3, 3), (1, 1, 1)),
    "slices": ((1, 3, 5, 9, 18), (2, 1, 3), ((2, 1, 2), (1, 0, 1), 1)),
}
LAST_OR_NOT = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "last"])


def arguments(case: str, dtype: torch.dtype, device: torch.device, last: bool) -> Any:
    size, kernel, window = CASES[case]
    layout = LAST[len(size)] if last else torch.contiguous_format
    x = torch.randn(size).to(device, dtype).contiguous(memory_format=layout)
    w = torch.randn(size[1], 1, *kernel).to(device, dtype).contiguous(memory_format=layout)
    b = torch.randn(size[1]).to(device, dtype)
    options = dict(zip(("stride", "padding", "dilation"), window, strict=True))
    return [t.requires_grad_() for t in (x, w, b)], options | {"groups": size[1]}


def per_axis(options: dict[str, Any], rank: int) -> ConvWindow:
    values = [
        v if isinstance(v, tuple) else (v,) * rank for k, v in options.items() if k != "groups"
    ]
    return ConvWindow(*values, options["groups"])


@LAST_OR_NOT
@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_native(case: str, last: bool, device: torch.device) -> None:
    rank = len(CASES[case][0]) - 2
    for dtype in DTYPES:
        inputs, options = arguments(case, dtype, device, last)
        ours, native = (getattr(m, f"conv{rank}d") for m in (W, F))
        check_against_native(
            lambda *t, f=ours, o=options: f(*t, **o),
            lambda *t, f=native, o=options: f(*t, **o),
            *inputs,
        )


@LAST_OR_NOT
@pytest.mark.parametrize("case", CASES)
def test_each_instruction_set(case: str, last: bool) -> None:
    """Small integers, whose sums are exact."""
    inputs, options = arguments(case, torch.float32, torch.device("cpu"), last)
    rank = len(CASES[case][0]) - 2
    with torch.no_grad():
        for t in inputs:
            t.copy_(torch.randint(-2, 3, t.shape))
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    expected = getattr(F, f"conv{rank}d")(*doubles, **options)
    grad = torch.randint(-2, 3, expected.shape)
    exact = torch.autograd.grad(expected, doubles, grad.double())
    for target in ("baseline", "avx2", "avx512"):
        if target not in _C.available_cpu_targets():
            continue
        with cpu_target(target):
            actual = getattr(W, f"conv{rank}d")(*inputs, **options)
            found = torch.autograd.grad(actual, inputs, grad.float())
        for got, want in zip(found, exact, strict=True):
            assert torch.equal(got, want.float())


@LAST_OR_NOT
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("case", ["small", "bands", "strided", "gaps", "large", "volume"])
def test_the_activation_is_undone(
    case: str, activation: str, last: bool, device: torch.device
) -> None:
    """The activation's gradient first, and then the three."""
    for dtype in (torch.float32, torch.bfloat16):
        (x, w, b), options = arguments(case, dtype, device, last)
        window = per_axis(options, x.dim() - 2)
        y = conv_activated(x, w, b, activation, 0.2, window)
        grad = torch.randn_like(y)
        found = torch.autograd.grad(y, (x, w, b), grad)
        undone = {
            "relu": lambda g, y: torch.ops.aten.threshold_backward(g, y, 0),
            "leaky_relu": lambda g, y: torch.ops.aten.leaky_relu_backward(g, y, 0.2, True),
            "tanh": torch.ops.aten.tanh_backward,
            "sigmoid": torch.ops.aten.sigmoid_backward,
        }[activation](grad.double(), y.detach().double()).to(dtype)
        plain = torch.ops.weft.conv_backward(x, undone, w, None, "none", 0, True, *window)
        # Each term may round otherwise; their errors add up as independent ones do.
        squares = (t.detach().square() for t in (x, undone, w))
        terms = torch.ops.weft.conv_backward(*squares, None, "none", 0, True, *window)
        for got, want, square in zip(found, plain, terms, strict=True):
            if activation == "relu":  # whose gradient is not rounded
                assert torch.equal(got, want)
            assert ((got - want).abs() <= 8 * torch.finfo(dtype).eps * square.sqrt()).all()


@LAST_OR_NOT
@pytest.mark.parametrize("case", ["small", "strided", "large", "volume"])
def test_equals_the_three(case: str, last: bool, device: torch.device) -> None:
    (x, w, _), options = arguments(case, torch.float32, device, last)
    window = per_axis(options, x.dim() - 2)
    ops = torch.ops.weft
    x, w = x.detach(), w.detach()
    grad = torch.randn_like(ops.conv(x, w, None, *window))
    gx, gw, gb = ops.conv_backward(x, grad, w, None, "none", 0, True, *window)
    torch.testing.assert_close(gx, ops.conv_dgrad(grad, w, None, x.shape, *window))
    torch.testing.assert_close(gw, ops.conv_wgrad(x, grad, w.shape, *window))
    torch.testing.assert_close(gb, ops.conv_bias_grad(grad))
    *_, none = ops.conv_backward(x, grad, w, None, "none", 0, False, *window)
    assert none.shape == (0,)
    # Layouts that differ, and operands that are no tensor of their own.
    mixed = grad.contiguous(memory_format=torch.contiguous_format)
    expanded = torch.ones((), device=device).expand(grad.shape)
    for g in (mixed, expanded):
        found = ops.conv_backward(x, g, w, None, "none", 0, True, *window)
        whole = ops.conv_backward(
            x, g.contiguous(memory_format=LAST[x.dim()]), w, None, "none", 0, True, *window
        )
        for got, want in zip(found, whole, strict=True):
            torch.testing.assert_close(got, want)


@LAST_OR_NOT
def test_what_no_window_holds_may_be_infinite(last: bool, device: torch.device) -> None:
    """Of a map whose last row and column lie outside of all windows."""
    layout = LAST[4] if last else torch.contiguous_format
    for size in (3, 2):
        x = torch.randn(2, 3, 2 * 20 + size, 2 * 20 + size, device=device)
        x[:, :, -1] = x[..., -1] = float("inf")
        x = x[:, :, : 2 * 20 + size].contiguous(memory_format=layout)
        w = torch.randn(3, 1, size, size, device=device)
        window = ConvWindow((2, 2), (0, 0), (1, 1), 3)
        map_ = x[:, :, 1:, 1:].contiguous(memory_format=layout)  # windows end one short of its end
        grad = torch.randn_like(torch.ops.weft.conv(map_, w, None, *window))
        _, gw, _ = torch.ops.weft.conv_backward(map_, grad, w, None, "none", 0, False, *window)
        assert gw.isfinite().all()


@LAST_OR_NOT
def test_bits_do_not_depend_on_threads(last: bool, device: torch.device) -> None:
    for case in ("small", "strided", "bands"):
        (x, w, b), options = arguments(case, torch.float32, device, last)
        window = per_axis(options, 2)

        def run(x: Tensor = x, w: Tensor = w, b: Tensor = b, window: Any = window) -> list[Tensor]:
            y = conv_activated(x, w, b, "relu", 0, window)
            return [y, *torch.autograd.grad(y.square().sum(), (x, w, b))]

        check_deterministic(run)


def test_opcheck_and_bad_arguments(device: torch.device) -> None:
    op = torch.ops.weft.conv_backward
    window = ([1, 1], [1, 1], [1, 1], 3)
    x, w = torch.randn(2, 3, 5, 6, device=device), torch.randn(3, 1, 3, 3, device=device)
    y = torch.relu(torch.ops.weft.conv(x, w, None, *window))
    torch.library.opcheck(op.default, (x, y, w, None, "none", 0.0, True, *window))
    torch.library.opcheck(op.default, (x, y, w, y, "relu", 0.0, False, *window))
    with pytest.raises(RuntimeError, match="grad must have the output's size"):
        op(x, y[0:1], w, None, "none", 0.0, True, *window)
    with pytest.raises(RuntimeError, match="output is expected where there is an activation"):
        op(x, y, w, None, "relu", 0.0, True, *window)
    with pytest.raises(RuntimeError, match="should be the same"):
        op(x, y.double(), w, None, "none", 0.0, True, *window)
    for empty in (x[:0], x[:0].to(memory_format=torch.channels_last)):
        gx, gw, gb = op(empty, y[:0], w, None, "none", 0.0, True, *window)
        assert gx.shape == empty.shape
        assert not gw.any()
        assert not gb.any()
