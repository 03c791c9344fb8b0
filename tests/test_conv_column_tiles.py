"""Few input channels, contiguous float32, on CPU: tiles of outputs with fewer products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import weft
import weft.functional as W
from harness import assert_as_accurate, check_against_native, check_deterministic
from weft import _C
from weft.conv_ops import ConvWindow, conv_activated
from weft.testing import cpu_target

# Size of the input, size of the weights, window. All take this way on AVX2 and AVX-512.
Case = tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]
CASES: dict[str, Case] = {
    "image": ((2, 3, 64, 64), (64, 3, 7, 7), {"stride": 2, "padding": 3}),
    "odd": ((2, 3, 51, 117), (70, 3, 7, 7), {"stride": 2, "padding": 3}),
    "plain": ((2, 3, 32, 31), (64, 3, 5, 5), {"padding": 2}),
    "threes": ((2, 7, 20, 32), (64, 7, 3, 3), {"padding": 1}),
    "no_padding": ((1, 2, 40, 41), (40, 2, 9, 9), {}),
    "fours": ((1, 3, 91, 131), (64, 3, 11, 11), {"stride": 4, "padding": 2}),
    "thirds": ((1, 4, 70, 103), (48, 4, 9, 9), {"stride": 3, "padding": 4}),
    "uneven": ((1, 3, 41, 70), (72, 3, 5, 8), {"stride": (1, 2), "padding": (4, 0)}),
    "grouped": ((2, 4, 33, 32), (100, 2, 7, 7), {"padding": 3, "groups": 2}),
    "many_outputs": ((1, 1, 16, 32), (150, 1, 9, 9), {"padding": 4}),
}
# Past the cache: rows that are whole vectors, and not; asked for ahead of time.
LARGE: dict[str, Case] = {
    "aligned": ((2, 3, 192, 192), (120, 3, 7, 7), {"stride": 2, "padding": 3}),
    "shifted": ((2, 3, 191, 194), (122, 3, 7, 7), {"stride": 2, "padding": 3}),
    "ahead": ((1, 3, 191, 194), (122, 3, 7, 7), {"stride": 2, "padding": 3}),
}


def arguments(case: Case) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    size, weight, window = case
    return torch.randn(size), torch.randn(weight), torch.randn(weight[0]), window


def targets() -> list[str]:
    return [t for t in ("avx2", "avx512") if t in _C.available_cpu_targets()]


def path(x: Tensor, w: Tensor, target: str = "avx512", **window: Any) -> str:
    (plan,) = weft.explain(lambda x: W.conv2d(x, w, None, **window), x, target=target)
    return plan.path


@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_native(case: str) -> None:
    x, w, b, window = arguments(CASES[case])
    for target in ("avx2", "avx512"):
        assert path(x, w, target, **window) == "column_tiles"
    for target in targets():
        with cpu_target(target):
            check_against_native(
                lambda *t: W.conv2d(*t, **window), lambda *t: F.conv2d(*t, **window), x, w, b
            )


@pytest.mark.parametrize("case", CASES)
def test_small_integers_are_exact(case: str) -> None:
    x, w, b, window = arguments(CASES[case])
    x, w, b = (torch.randint_like(t, -3, 4) for t in (x, w, b))
    expected = F.conv2d(x.double(), w.double(), b.double(), **window)
    for target in targets():
        with cpu_target(target):
            assert torch.equal(W.conv2d(x, w, b, **window).double(), expected)


@pytest.mark.parametrize("case", ["odd", "fours", "grouped"])
def test_bits_do_not_depend_on_threads_or_on_the_batch(case: str) -> None:
    x, w, b, window = arguments(CASES[case])
    x = torch.cat([x, torch.randn_like(x), torch.randn_like(x)])
    check_deterministic(lambda: (W.conv2d(x, w, b, **window),))
    y = W.conv2d(x, w, b, **window)
    assert torch.equal(W.conv2d(x[1:2], w, b, **window), y[1:2])
    assert torch.equal(W.conv2d(x[1], w, b, **window), y[1])


@pytest.mark.parametrize("case", ["odd", "plain", "thirds"])
def test_gradients(case: str) -> None:
    x, w, b, window = arguments(CASES[case])
    leaves = [t.requires_grad_() for t in (x, w, b)]
    check_against_native(
        lambda *t: W.conv2d(*t, **window), lambda *t: F.conv2d(*t, **window), *leaves
    )


@pytest.mark.parametrize("activation", ["none", "relu", "tanh"])
@pytest.mark.parametrize("case", LARGE)
def test_large_outputs(case: str, activation: str) -> None:
    """An activation in the same pass has the bits of the two in sequence."""
    x, w, b, window = arguments(LARGE[case])
    assert path(x, w, **window) == "column_tiles"
    plain = W.conv2d(x, w, b, **window)
    if activation == "none":
        exact = F.conv2d(x.double(), w.double(), b.double(), **window)
        assert_as_accurate(plain, F.conv2d(x, w, b, **window), exact)
        return
    step = ConvWindow((2, 2), (3, 3), (1, 1), 1)
    fused = conv_activated(x, w, b, activation, 0, step)
    if activation == "relu":
        assert torch.equal(fused, plain.relu())
    else:  # a function of another library
        torch.testing.assert_close(fused, plain.tanh())
    parts = torch.cat([conv_activated(i, w, b, activation, 0, step) for i in x.split(1)])
    assert torch.equal(fused, parts)  # which go to the map in other ways


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_pooling_behind_it(pooling: str) -> None:
    block = weft.nn.ConvBlock2d(3, 64, 7, 2, 3, detector="relu", pooling=pooling, pool_size=2)
    x = torch.randn(3, 3, 90, 91)
    with torch.no_grad():
        y = W.conv2d(x, block.weight, block.bias, 2, 3).relu()
        assert torch.equal(block(x), getattr(W, f"{pooling}_pool2d")(y, 2))


# ---- values that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2.0**127])
@pytest.mark.parametrize("case", ["odd", "fours"])
def test_a_value_reaches_the_outputs_that_read_it_and_no_other(case: str, value: float) -> None:
    """2**127 overflows where two of it are added; times powers of two it is exact."""
    x, w, b, window = arguments(CASES[case])
    x = torch.cat([x, x, x])
    w = torch.ldexp(w.sign(), torch.randint(-9, -2, w.shape))
    clean = W.conv2d(x, w, b, **window)
    x[1, 1, 5, 6] = x[1, 1, 5, 6 + window["stride"]] = value
    x[1, 0, -1, -1] = value  # of the last tile, which ends beyond the map
    y = W.conv2d(x, w, b, **window)
    exact = F.conv2d(x.double(), w.double(), b.double(), **window)
    assert_as_accurate(y, F.conv2d(x, w, b, **window), exact)
    others = [n for n in range(len(x)) if n != 1]
    assert torch.equal(y[others], clean[others])


def test_weights_that_are_not_finite() -> None:
    x, w, b, window = arguments(CASES["odd"])
    x /= 1000
    w[5, 2, 1, 1] = float("nan")
    w[11, 0, 0, 2] = float("inf")
    w[20, 1] = 2e38
    exact = F.conv2d(x.double(), w.double(), b.double(), **window)
    assert_as_accurate(W.conv2d(x, w, b, **window), F.conv2d(x, w, b, **window), exact)


def test_positions_that_no_window_reads() -> None:
    """Padding may be negative behind the map; tiles end beyond the last window."""
    x, w, _, _ = arguments(CASES["plain"])
    clean = torch.ops.weft.conv(x, w, None, [1, 1], [2, 2, -1, -1], [1, 1], 1)
    x[..., -1, :] = x[..., :, -1] = float("nan")
    actual = torch.ops.weft.conv(x, w, None, [1, 1], [2, 2, -1, -1], [1, 1], 1)
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, clean)


# ---- plans ---------------------------------------------------------------------------------------


def test_what_takes_another_way() -> None:
    def way(size: tuple[int, ...], weight: tuple[int, ...], **options: Any) -> str:
        dtype = options.pop("dtype", torch.float32)
        target = options.pop("target", "avx512")
        x, w = (torch.empty(s, dtype=dtype, device="meta") for s in (size, weight))
        return path(x, w, target, **options)

    size, weight = (8, 3, 64, 64), (64, 3, 7, 7)
    assert way(size, weight, padding=3) == "column_tiles"
    assert way(size, weight, padding=3, target="baseline") != "column_tiles"
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert way(size, weight, padding=3, dtype=dtype) != "column_tiles"
    assert way(size, weight, padding=3, dilation=2) != "column_tiles"
    assert way(size, (64, 3, 4, 4), stride=4) == "columns"  # a place in each phase
    assert way((8, 3, 9, 9), weight, padding=3) == "columns"  # the weights are the work
    assert way(size, (8, 3, 3, 3), padding=1) == "columns"  # and so are the transforms


def test_a_plan_counts_its_own_operations() -> None:
    x, w = torch.empty(8, 3, 224, 224), torch.empty(64, 3, 7, 7)
    (plan,) = weft.explain(W.conv2d, x, w, None, 2, 3)
    assert plan.path == "column_tiles"
    assert plan.flops == 2 * 100 * 3 * 8 * 56 * 56 * 64  # for four outputs of 49 places
