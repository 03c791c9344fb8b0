"""Pooling from the cache: large enough maps are cut into parts, and nothing shows of it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import weft
import weft.functional as W
from harness import DTYPES
from weft import _C
from weft.testing import cpu_target, host_execution

# Channels in and out, groups, extents, window, stride, padding, and how the plan cuts them.
MAPS: dict[str, tuple[int, int, int, tuple[int, ...], int, int, int]] = {
    "depthwise": (24, 24, 24, (70, 61), 3, 1, 1),
    "depthwise, large windows": (12, 12, 12, (90, 83), 11, 1, 5),
    "grouped": (32, 64, 4, (70, 61), 3, 1, 1),
    "pointwise": (16, 48, 1, (60, 61), 1, 1, 0),
    "first": (3, 32, 1, (130, 101), 3, 2, 1),
    "dense, large windows": (3, 32, 1, (101, 131), 7, 2, 3),
    "wide padding": (16, 32, 1, (60, 61), 1, 1, 3),
    "1-d": (16, 16, 16, (9001,), 5, 1, 2),
    "3-d": (16, 16, 16, (9, 33, 31), 3, 1, 1),
    "3-d, dense": (4, 32, 1, (9, 33, 31), 3, 1, 1),
}
LAST = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d}
POOLS = {
    "max 2": {"pooling": "max", "pool_size": 2},
    "max 3": {"pooling": "max", "pool_size": 3, "pool_stride": 2, "pool_padding": 1},
    "max dense": {"pooling": "max", "pool_size": 3, "pool_stride": 1},
    "avg 2": {"pooling": "avg", "pool_size": 2},
    "avg apart": {"pooling": "avg", "pool_size": 2, "pool_stride": 5},
    "avg 3": {"pooling": "avg", "pool_size": 3, "pool_stride": 2, "pool_padding": 1},
}


def build(case: str, pool: str, last: bool, **options: Any) -> tuple[Any, Any, Tensor]:
    """A block, its layers one by one, and an input."""
    c, k, groups, extents, window, stride, padding = MAPS[case]
    rank = len(extents)
    make = getattr(weft.nn, f"ConvBlock{rank}d")
    arguments = (c, k, window, stride, padding)
    block = make(*arguments, groups=groups, **POOLS[pool], **options)
    layer = getattr(weft.nn, f"Conv{rank}d")(*arguments, groups=groups, dtype=block.weight.dtype)
    layer.load_state_dict(block.state_dict())
    kind = "MaxPool" if block.pooling == "max" else "AvgPool"
    pooling = getattr(weft.nn, f"{kind}{rank}d")(
        block.pool_size, block.pool_stride, block.pool_padding
    )
    sequence = torch.nn.Sequential(layer, torch.nn.ReLU(), pooling)
    x = torch.randn(3, c, *extents, dtype=block.weight.dtype)
    if last:
        x = x.contiguous(memory_format=LAST[rank])
        block, sequence = (m.to(memory_format=LAST[rank]) for m in (block, sequence))
    return block, sequence, x


def assert_same_gradients(
    block: Any, sequence: Any, x: Tensor, case: Any, target: str | None = None
) -> None:
    """Of input, weights and bias, bit by bit."""
    x.requires_grad_()
    with cpu_target(target or _C.cpu_target()):
        found, expected = (m(x) for m in (block, sequence))
        grad = torch.randn_like(found)
        found, expected = (
            torch.autograd.grad(y, (x, *m.parameters()), grad)
            for y, m in ((found, block), (expected, sequence))
        )
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e), case


def path_of(block: Any, x: Tensor) -> str:
    with torch.no_grad():
        plans = weft.explain(block, x)
    return plans[0].path if plans[0].kernel == "conv_pooled" else "sequence"


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("case", MAPS)
def test_bits_of_the_sequence(case: str, last: bool) -> None:
    for pool in POOLS:
        block, sequence, x = build(case, pool, last)
        bands = last and len(block.kernel_size) > 1
        in_sequence = case == "pointwise" and not last
        assert path_of(block, x) == ("bands" if bands else "sequence" if in_sequence else "groups")
        with torch.no_grad():
            assert torch.equal(block(x), sequence(x)), pool
        x.requires_grad_()
        found, expected = (
            torch.autograd.grad(m(x).sum(), (x, *m.parameters())) for m in (block, sequence)
        )
        for f, e in zip(found, expected, strict=True):
            assert torch.equal(f, e), pool


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_bits_of_other_dtypes(dtype: torch.dtype) -> None:
    for case in ("depthwise", "pointwise", "first", "grouped"):
        for last in (False, True):
            block, sequence, x = build(case, "max 3", last, dtype=dtype)
            with torch.no_grad():
                assert torch.equal(block(x), sequence(x)), (case, last)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_same_bits_for_any_number_of_threads(last: bool) -> None:
    block, _, x = build("depthwise", "max 2", last)
    threads = torch.get_num_threads()
    outputs = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        outputs.append(block(x))
    torch.set_num_threads(threads)
    assert all(torch.equal(outputs[0], y) for y in outputs)


@pytest.mark.parametrize("target", ["baseline", "avx2", "avx512"])
def test_signs_of_averages(target: str) -> None:
    """The gradient's bits are those of the layers one by one, whatever is kept instead of a map."""
    if target not in _C.available_cpu_targets():
        return
    options = {"detector": "leaky_relu", "negative_slope": 0.25}
    for detector in ({}, options):
        for case, last in (
            ("depthwise", True),
            ("depthwise", False),
            ("pointwise", False),
            ("3-d", True),
            ("3-d", False),
            ("1-d", False),
        ):
            for pool in ("avg 2", "avg 3", "avg apart"):
                block, sequence, x = build(case, pool, last, **detector)
                if detector:
                    sequence[1] = torch.nn.LeakyReLU(0.25)
                assert_same_gradients(block, sequence, x, (case, pool), target)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_signs_of_every_dtype(device: torch.device, last: bool) -> None:
    layout = torch.channels_last if last else torch.contiguous_format
    pool = ([3, 2], [2, 2], [1, 0])
    # Rows that end inside a byte, and with one.
    for dtype, extents in itertools.product(DTYPES, ([9, 11], [8, 16])):
        x = torch.randn(2, 5, *extents, dtype=dtype, device=device)
        x = x.contiguous(memory_format=layout)
        x[0, 2, 3, 4] = torch.nan
        w = torch.ones(5, 1, 1, 1, dtype=dtype, device=device)
        window = ([1, 1], [0, 0], [1, 1], 5)
        for activation, slope in (("relu", 0), ("leaky_relu", 0.25)):
            stages = (activation, slope)
            y, signs = torch.ops.weft.conv_pooled(x, w, None, *stages, *window, "avg", *pool, True)
            grad = torch.randn_like(y)
            found = torch.ops.weft.conv_pooled_grad(grad, signs, x.shape, *stages, *pool, last)
            spread = torch.ops.weft.avg_pool_backward(grad, x.shape, *pool, False, True, None, last)
            expected = torch.ops.aten.leaky_relu_backward(spread, x, slope, False)
            if activation == "relu":
                expected = torch.ops.aten.threshold_backward(spread, x, 0)
            assert torch.equal(found, expected)
            assert found.is_contiguous(memory_format=layout)


def test_rows_between_the_places_of_even_windows() -> None:
    """A band of such windows may have as many outputs as rows, and is no map of its own."""
    x = torch.randn(2, 48, 40, 56, requires_grad=True)
    x = x.contiguous(memory_format=torch.channels_last)
    layer = weft.nn.Conv2d(48, 48, 3, padding=1, groups=48).to(memory_format=torch.channels_last)
    options: dict[str, Any] = {"pool_size": (2, 1), "pool_stride": 1}
    block = weft.nn.ConvBlock2d(48, 48, 3, padding=1, groups=48, pooling="avg", **options)
    block = block.to(memory_format=torch.channels_last)
    block.load_state_dict(layer.state_dict())
    x.retain_grad()
    found, expected = block(x), W.avg_pool2d(layer(x).relu(), (2, 1), 1)
    grad = torch.randn_like(found)
    assert torch.equal(found, expected)
    for f, e in zip(
        torch.autograd.grad(found, (x, *block.parameters()), grad),
        torch.autograd.grad(expected, (x, *layer.parameters()), grad),
        strict=True,
    ):
        assert torch.equal(f, e)


def test_the_map_gradient_is_made_in_the_cache() -> None:
    for pool in ("max 2", "avg 2"):
        block, _, x = build("depthwise", pool, False)
        *_, backward = weft.explain(block, x.requires_grad_(), backward=True)
        assert (backward.op, backward.path) == ("conv_pooled_backward", "made")
        # The map and its gradient are 2 of the 4 that the layers one by one would move.
        map_bytes = 3 * 24 * 70 * 61 * 4
        assert backward.least_bytes < 3 * map_bytes
        small = weft.explain(block, x.detach()[..., :30, :30].requires_grad_(), backward=True)
        assert "conv_pooled_backward" not in {plan.kernel for plan in small}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_every_dtype(dtype: torch.dtype) -> None:
    for case, pool in itertools.product(("depthwise", "1-d"), ("max 3", "avg 3")):
        block, sequence, x = build(case, pool, False, dtype=dtype)
        assert_same_gradients(block, sequence, x, (case, pool))


@pytest.mark.parametrize("pool", ["max 2", "avg 2"])
def test_the_unpooled_map_is_not_kept(pool: str, device: torch.device) -> None:
    block, sequence, x = build("depthwise", pool, False)
    block, sequence, x = (m.to(device) for m in (block, sequence, x))
    kept = []
    for module in (block, sequence):
        tensors: dict[int, int] = {}

        def note(t: Tensor, found: dict[int, int] = tensors) -> Tensor:
            found[t.data_ptr()] = t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            module(x)
        kept.append(sum(tensors.values()))
    map_bytes = 3 * 24 * 70 * 61 * 4
    assert kept[0] <= kept[1] - map_bytes / 2


def test_small_and_narrow_maps_cuda_and_few_channels_go_in_sequence() -> None:
    block, _, x = build("depthwise", "max 2", False)
    assert [p.op for p in weft.explain(block, x[:, :, :8, :8])] == ["conv_pooled"] * 2
    plans = weft.explain(block, x, target="cuda")
    assert [p.kernel for p in plans] == ["conv_depthwise_fprop", "max_pool_tile"]
    assert path_of(block, torch.randn(16, 24, 30, 30)) == "sequence"  # pooled a plane in each lane
    few = weft.nn.ConvBlock2d(1, 2, 3, pooling="max")
    assert path_of(few, torch.randn(8, 1, 200, 200)) == "sequence"


def test_opcheck_compile_and_second_derivative(device: torch.device) -> None:
    block = weft.nn.ConvBlock2d(2, 3, 3, pooling="max", device=device, dtype=torch.float64)
    x = torch.randn(2, 2, 7, 8, device=device, dtype=torch.float64, requires_grad=True)
    tensors = tuple(t.detach() for t in (x, block.weight, block.bias))
    window = ([1, 1], [0, 0], [1, 1], 1)
    for keep in (False, True):
        for kind in ("max", "avg"):
            torch.library.opcheck(
                torch.ops.weft.conv_pooled.default,
                (*tensors, "relu", 0.0, *window, kind, [2, 2], [2, 2], [0, 0], keep),
            )
    pool = ([2, 2], [2, 2], [0, 0])
    _, signs = torch.ops.weft.conv_pooled(*tensors, "relu", 0, *window, "avg", *pool, True)
    grad = torch.randn(2, 3, 2, 3, device=device, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.weft.conv_pooled_grad.default,
        (grad, signs, [2, 3, 5, 6], "relu", 0, *pool, False),
    )
    for kind in ("max", "avg"):
        block.pooling = kind
        check_second_derivative(block, x)
        y, kept = torch.ops.weft.conv_pooled(*tensors, "relu", 0, *window, kind, *pool, True)
        stages = (y if kind == "max" else None, "relu", 0, True, *window, kind, *pool)
        torch.library.opcheck(
            torch.ops.weft.conv_pooled_backward.default,
            (tensors[0], torch.randn_like(y), tensors[1], kept, *stages),
        )


def check_second_derivative(block: Any, x: Tensor) -> None:
    pooling = getattr(W, f"{block.pooling}_pool2d")
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), block(x))

    def gradient_of_the_penalty(module: Any) -> tuple[Tensor, ...]:
        (gx,) = torch.autograd.grad(module(x).tanh().sum(), x, create_graph=True)
        return torch.autograd.grad(gx.square().sum(), (x, block.weight))

    def sequence(x: Tensor) -> Tensor:
        return pooling(W.conv2d(x, block.weight, block.bias).relu(), 2)

    for f, e in zip(gradient_of_the_penalty(block), gradient_of_the_penalty(sequence), strict=True):
        torch.testing.assert_close(f, e)


def test_errors_of_the_op() -> None:
    x, w = torch.ones(1, 1, 4), torch.ones(1, 1, 1)
    with pytest.raises(ValueError, match="expected pooling to be 'max' or 'avg', got 'min'"):
        torch.ops.weft.conv_pooled(
            x, w, None, "relu", 0.0, [1], [0], [1], 1, "min", [2], [2], [0], False
        )
    signs = torch.zeros(1, 1, dtype=torch.uint8)
    grad = torch.ones(1, 1, 2)
    for bad, words in (
        ((grad[:, :, :1], signs, "relu"), r"expected grad of size \[1, 1, 2\], got \[1, 1, 1\]"),
        ((grad, signs[:0], "relu"), r"signs of size \[1, 1\], got Byte of size \[0, 1\]"),
        ((grad, signs, "tanh"), "expected activation to be relu or leaky_relu, got tanh"),
    ):
        arguments = (*bad[:2], [1, 1, 4], bad[2], 0.0, [2], [2], [0], False)
        with pytest.raises((RuntimeError, ValueError), match=words):
            torch.ops.weft.conv_pooled_grad(*arguments)
    x, grad = torch.ones(1, 1, 600_000), torch.ones(1, 1, 300_000)
    window, pool = ([1], [0], [1], 1), ("max", [2], [2], [0])
    _, places = torch.ops.weft.conv_pooled(x, w, None, "relu", 0, *window, *pool, True)
    for bad, words in (
        ((grad, places, None), "output is expected of maxima where there is an activation"),
        ((grad[..., 1:], places, grad), r"expected grad of size \[1, 1, 300000\], got"),
        ((grad, places[..., 1:], grad), "expected kept to come from conv_pooled with the same"),
        ((grad, places.int(), grad), "expected kept to come from conv_pooled with the same"),
        ((grad, places, grad[..., 1:]), r"expected output of size \[1, 1, 300000\], got"),
        ((grad.double(), places, grad), "grad"),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.weft.conv_pooled_backward(
                x, bad[0], w, bad[1], bad[2], "relu", 0, False, *window, *pool
            )
    x = torch.ones(1, 1, 4)
    with pytest.raises(RuntimeError, match="pad should be at most half"):
        weft.nn.ConvBlock1d(1, 1, 1, pooling="max", pool_padding=2)(x)
    with host_execution(), pytest.raises(RuntimeError, match="output size is too small"):
        weft.nn.ConvBlock1d(1, 1, 1, pooling="avg", pool_size=9)(x)
