"""Windows of 3x3 by Winograd's tiles: values, bits, and values that are not finite."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import weft
import weft.functional as W
from harness import assert_as_accurate, check_against_native, check_deterministic
from weft import _C
from weft.testing import cpu_target

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
LAST_OR_NOT = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "last"])
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)

# Input size, output channels, window.
CASES: dict[str, tuple[tuple[int, ...], int, dict[str, Any]]] = {
    "even": ((2, 64, 14, 16), 64, {"padding": 1}),
    "odd": ((3, 40, 17, 15), 36, {"padding": 1}),
    "no_padding": ((1, 48, 20, 23), 40, {}),
    "wide_padding": ((2, 64, 20, 17), 48, {"padding": 2}),
    "uneven_padding": ((2, 48, 15, 14), 48, {"padding": (2, 0)}),
    "tails": ((2, 33, 21, 19), 49, {"padding": 1}),
    "small_maps": ((12, 96, 8, 8), 80, {"padding": 1}),
    "narrow": ((12, 64, 21, 4), 64, {"padding": 1}),
    "many_channels": ((2, 200, 12, 12), 136, {"padding": 1}),
    "grouped": ((1, 64, 30, 31), 96, {"padding": 1, "groups": 2}),
    "volume": ((1, 24, 10, 13, 12), 24, {"padding": 1}),
    "shallow": ((1, 32, 2, 13, 14), 24, {"padding": (2, 1, 1)}),
}


def arguments(
    case: str, last: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    size, k, options = CASES[case]
    rank = len(size) - 2
    x = torch.randn(size, dtype=dtype)
    w = torch.randn(k, size[1] // options.get("groups", 1), *[3] * rank, dtype=dtype)
    if last:
        x, w = (t.contiguous(memory_format=LAST[rank + 2]) for t in (x, w))
    return x, w, torch.randn(k, dtype=dtype), options


def conv(x: Tensor, module: Any = W) -> Any:
    return getattr(module, f"conv{x.dim() - 2}d")


def paths(function: Any, *inputs: Tensor, target: str | None = None) -> list[str]:
    plans = weft.explain(function, *inputs, backward=True, target=target)
    return [p.path for p in plans if p.kernel in ("conv_fprop", "conv_dgrad", "conv_wgrad")]


@LAST_OR_NOT
@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_native(case: str, last: bool) -> None:
    x, w, b, options = arguments(case, last)
    x.requires_grad_()
    w.requires_grad_()
    assert paths(lambda *t: conv(x)(*t, **options), x, w, b) == ["winograd"] * 3
    check_against_native(
        lambda *t: conv(x)(*t, **options), lambda *t: conv(x, F)(*t, **options), x, w, b
    )


def long_double(t: Tensor) -> Any:
    return t.detach().numpy().astype(np.longdouble)


def columns(maps: Tensor) -> Any:
    """[N, channels, 9, positions]: what each place of a window reads, with padding of one."""
    n, c, h, w = maps.shape
    wide = np.pad(long_double(maps), ((0, 0), (0, 0), (1, 1), (1, 1)))
    places = [wide[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return np.stack(places, 2).reshape(n, c, 9, h * w)


@LAST_OR_NOT
@pytest.mark.parametrize("case", ["even", "odd", "many_channels"])
def test_doubles_are_as_accurate_as_native(case: str, last: bool) -> None:
    """Against sums in long double; PyTorch's own errors are of the size of those looked for."""
    x, w, _, options = arguments(case, last, torch.float64)
    x.requires_grad_()
    w.requires_grad_()
    assert paths(lambda *t: W.conv2d(*t, None, **options), x, w) == ["winograd"] * 3
    seed = torch.randn_like(W.conv2d(x, w, None, **options))
    of_x, of_seed, window = columns(x), columns(seed), long_double(w).reshape(*w.shape[:2], 9)
    flat = long_double(seed).reshape(*seed.shape[:2], -1)
    exact = [
        np.einsum("kcp,ncpi->nki", window, of_x),
        np.einsum("kcp,nkpi->nci", window[:, :, ::-1], of_seed),
        np.einsum("nki,ncpi->kcp", flat, of_x),
    ]

    def errors(module: Any) -> list[float]:
        y = module.conv2d(x, w, None, **options)
        found = (y, *torch.autograd.grad(y, (x, w), seed))
        pairs = zip(found, exact, strict=True)
        return [float(abs(long_double(t).reshape(e.shape) - e).max()) for t, e in pairs]

    for own, native in zip(errors(W), errors(F), strict=True):
        assert own <= 1.5 * native


@FLOATS
@LAST_OR_NOT
@pytest.mark.parametrize("target", _C.available_cpu_targets())
@pytest.mark.parametrize("case", CASES)
def test_small_integers_are_exact(case: str, target: str, last: bool, dtype: torch.dtype) -> None:
    like, weight, bias, options = arguments(case, last, dtype)
    x, w, b = (torch.randint_like(t, -3, 4).requires_grad_() for t in (like, weight, bias))
    doubles = [t.detach().double().requires_grad_() for t in (x, w)]
    expected = conv(x, F)(*doubles, b.double(), **options)
    seed = torch.randint_like(expected, -2, 3)
    exact = torch.autograd.grad(expected, doubles, seed)
    with cpu_target(target):
        actual = conv(x)(x, w, b, **options)
        gradients = torch.autograd.grad(actual, (x, w), seed.to(dtype))
    assert torch.equal(actual.double(), expected)
    for got, want in zip(gradients, exact, strict=True):
        assert torch.equal(got.double(), want)


@LAST_OR_NOT
@pytest.mark.parametrize("case", ["odd", "volume"])
def test_a_transposed_convolution_is_the_input_gradient(case: str, last: bool) -> None:
    like, w, _, options = arguments(case, last)
    x = torch.randn(like.shape[0], *CASES[case][1:2], *like.shape[2:])
    x = x.contiguous(memory_format=LAST[x.dim()]) if last else x
    b = torch.randn(like.shape[1])
    ours, native = (getattr(m, f"conv_transpose{x.dim() - 2}d") for m in (W, F))
    assert paths(lambda x: ours(x, w, b, **options), x.requires_grad_()) == ["winograd"] * 2
    check_against_native(lambda *t: ours(*t, **options), lambda *t: native(*t, **options), x, w, b)


@LAST_OR_NOT
def test_unbatched_sliced_and_expanded(last: bool) -> None:
    x, w, b, options = arguments("odd", last)
    wide = torch.randn(3, 50, 19, 16)[:, 4:44, 1:18, :15]
    single = torch.randn(1, 40, 17, 15).expand_as(x)
    for given in (x[1], wide, single):
        check_against_native(
            lambda *t: W.conv2d(*t, **options), lambda *t: F.conv2d(*t, **options), given, w, b
        )


@FLOATS
@LAST_OR_NOT
@pytest.mark.parametrize("case", ["odd", "many_channels", "volume"])
def test_bits_do_not_depend_on_threads_or_on_the_batch(
    case: str, last: bool, dtype: torch.dtype
) -> None:
    x, w, b, options = arguments(case, last, dtype)
    x = torch.cat([x, torch.randn_like(x)])
    x = x.contiguous(memory_format=LAST[x.dim()]) if last else x
    x.requires_grad_()
    w.requires_grad_()
    seed = torch.randn_like(conv(x)(x, w, b, **options))

    def run() -> tuple[Tensor, ...]:
        y = conv(x)(x, w, b, **options)
        return y, *torch.autograd.grad(y, (x, w), seed)

    check_deterministic(run)
    y = conv(x)(x, w, b, **options)
    part = slice(1, None)
    assert torch.equal(conv(x)(x[part], w, b, **options), y[part])


@LAST_OR_NOT
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "sigmoid"])
def test_a_fused_activation_has_the_bits_of_the_two_in_sequence(
    activation: str, last: bool
) -> None:
    x, w, b, options = arguments("odd", last)
    sums = W.conv2d(x, w, b, **options)
    one = [1, 1]
    fused = torch.ops.weft.conv_activated(x, w, b, activation, 0.25, one, one, one, 1)
    expected = {
        "relu": sums.relu(),
        "leaky_relu": F.leaky_relu(sums, 0.25),
        "tanh": sums.tanh(),
        "sigmoid": sums.sigmoid(),
    }[activation]
    if activation in ("relu", "leaky_relu"):
        assert torch.equal(fused, expected)
    else:  # functions of another library
        torch.testing.assert_close(fused, expected)


# ---- values that are not finite ------------------------------------------------------------------


def check_values(x: Tensor, w: Tensor, **options: Any) -> Tensor:
    actual = W.conv2d(x, w, **options)
    native = F.conv2d(x, w, **options)
    assert_as_accurate(actual, native, F.conv2d(x.double(), w.double(), **options))
    return actual


@LAST_OR_NOT
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2e38])
def test_a_value_reaches_the_outputs_that_read_it_and_no_other(value: float, last: bool) -> None:
    """2e38 is finite, and overflows where two of it are added."""
    x, w, _, options = arguments("odd", last)
    w /= 100
    clean = W.conv2d(x, w, **options)
    x[1, 3, 5, 6] = x[1, 3, 5, 7] = value
    x[1, 7, 16, 14] = value  # the last tile, of which three outputs lie beyond the map
    y = check_values(x, w, **options)
    assert torch.equal(y[0], clean[0])
    assert torch.equal(y[2], clean[2])


@LAST_OR_NOT
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.2e308])
def test_doubles_that_are_not_finite(value: float, last: bool) -> None:
    x, w, _, options = arguments("odd", last, torch.float64)
    w.requires_grad_()
    x[1, 3, 5, 6] = x[1, 3, 5, 7] = value
    seed = torch.randn_like(W.conv2d(x, w, **options)) / 100
    found, native = (
        (y, *torch.autograd.grad(y, w, seed))
        for module in (W, F)
        for y in (module.conv2d(x, w / 100, **options),)
    )
    torch.testing.assert_close(found, native, equal_nan=True)


@LAST_OR_NOT
def test_weights_that_are_not_finite(last: bool) -> None:
    x, w, _, options = arguments("odd", last)
    x /= 1000
    w[5, 3, 1, 1] = float("nan")
    w[11, 4, 0, 2] = float("inf")
    w[20] = 2e38  # two of it are added
    check_values(x, w, **options)


@LAST_OR_NOT
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2e38])
def test_weight_gradients_of_values_that_are_not_finite(value: float, last: bool) -> None:
    x, w, _, options = arguments("odd", last)
    w.requires_grad_()
    seed = torch.randn_like(W.conv2d(x, w, **options)) / 100
    x[1, 3, 16, 6] = x[1, 3, 16, 7] = value  # the last row, which only two rows of windows read
    results = [
        torch.autograd.grad(module.conv2d(x.to(dtype), weight, **options), weight, seed.to(dtype))
        for module, dtype in ((W, x.dtype), (F, x.dtype), (F, torch.float64))
        for weight in (w.detach().to(dtype).requires_grad_(),)
    ]
    assert_as_accurate(*(gradient for (gradient,) in results))


@LAST_OR_NOT
def test_positions_that_no_window_reads(last: bool) -> None:
    """Padding may be negative behind the map; tiles end beyond the last window."""
    x, w, _, _ = arguments("odd", last)
    x[..., -1, :] = x[..., :, -1] = float("nan")
    one = [1, 1]
    actual = torch.ops.weft.conv(x, w, None, one, [1, 1, -1, -1], one, 1)
    assert actual.isfinite().all()
    native = F.conv2d(x[..., :-1, :-1], w, padding=1)[..., :-1, :-1]
    exact = F.conv2d(x[..., :-1, :-1].double(), w.double(), padding=1)[..., :-1, :-1]
    assert_as_accurate(actual, native, exact)


# ---- plans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["baseline", "avx2", "avx512"])
def test_what_takes_another_way(target: str) -> None:
    def path(size: tuple[int, ...], k: int, dtype: torch.dtype, **options: Any) -> set[str]:
        x = torch.empty(size, dtype=dtype, device="meta", requires_grad=True)
        c = size[1] // options.get("groups", 1)
        window = options.pop("window", 3)
        w = torch.empty(k, c, window, window, dtype=dtype, device="meta", requires_grad=True)
        return set(paths(lambda *t: W.conv2d(*t, **options), x, w, target=target))

    size, real = (8, 64, 28, 28), torch.float32
    assert path(size, 64, real, padding=1) == {"winograd"}
    assert path(size, 64, torch.float64, padding=1) == {"winograd"}
    for dtype in (torch.bfloat16, torch.float16):
        assert path(size, 64, dtype, padding=1) == {"product"}
    for other in ({"stride": 2}, {"dilation": 2}, {"window": 5}, {"window": 1}, {"groups": 8}):
        assert "winograd" not in path(size, 64, real, **other)
    assert "winograd" not in path((8, 3, 56, 56), 64, real, padding=1)
    assert path((1, 512, 7, 7), 512, real, padding=1) == {"product"}  # the weights are the work


def test_a_plan_counts_its_own_operations() -> None:
    x = torch.empty(8, 64, 28, 28)
    w = torch.empty(64, 64, 3, 3)
    (plan,) = weft.explain(W.conv2d, x, w, None, 1, 1)
    assert plan.path == "winograd"
    assert plan.flops == 2 * 16 * 8 * 14 * 14 * 64 * 64
    assert plan.bytes == plan.least_bytes + 2 * 16 * 64 * 64 * 4


@LAST_OR_NOT
def test_pooling_behind_it_goes_in_sequence(last: bool) -> None:
    block = weft.nn.ConvBlock2d(32, 48, 3, 1, 1, detector="relu", pooling="max", pool_size=2)
    x = torch.randn(4, 32, 40, 44)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
        block = block.to(memory_format=torch.channels_last)
    with torch.no_grad():
        plans = [p.path for p in weft.explain(block, x)]
        pooled = block(x)
        y = W.conv2d(x, block.weight, block.bias, padding=1)
    assert plans[0] == "winograd"
    assert torch.equal(pooled, W.max_pool2d(y.relu(), 2))
