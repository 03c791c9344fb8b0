"""Pooling on the CPU: problems large or odd enough to take each path of csrc/pool/pool_plan.h."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import weft
import weft.functional as W
from harness import DTYPES, check_against_native
from weft import _C
from weft.testing import cpu_target

F = torch.nn.functional

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Name, size of the input, arguments.
PROBLEMS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "a row in tiles": ("pool1d", (1, 2, 30011), {"kernel_size": 5, "stride": 2, "padding": 2}),
    "tiles, windows touch": ("pool1d", (2, 1, 30011), {"kernel_size": 15}),
    "tiles, windows wider than vectors": ("pool1d", (1, 1, 30011), {"kernel_size": 37}),
    "very wide windows": ("pool1d", (1, 2, 5003), {"kernel_size": 301, "stride": 7}),
    "passes in strips": ("pool2d", (1, 2, 71, 333), {"kernel_size": 13, "stride": 1, "padding": 6}),
    "passes, stride 2": ("pool2d", (2, 1, 61, 45), {"kernel_size": 25, "stride": 2, "padding": 12}),
    "passes, powers of two": ("pool2d", (1, 3, 40, 33), {"kernel_size": (16, 32), "stride": 1}),
    "touching, ends left over": ("pool2d", (3, 2, 23, 31), {"kernel_size": 3, "ceil_mode": True}),
    "windows apart": ("pool2d", (2, 3, 29, 31), {"kernel_size": (2, 3), "stride": (3, 5)}),
    "window is the plane": ("pool2d", (5, 37, 7, 7), {"kernel_size": 7}),
    "one plane in pieces": ("pool2d", (1, 2, 301, 499), {"kernel_size": (301, 499)}),
    "depth": ("pool3d", (2, 3, 9, 17, 19), {"kernel_size": 3, "stride": 2}),
    "depth, windows touch": ("pool3d", (2, 3, 8, 17, 19), {"kernel_size": 2}),
    "tiny planes": ("pool2d", (3, 30, 5, 7), {"kernel_size": 2, "stride": 2, "padding": 1}),
    "tiny maps in depth": ("pool3d", (2, 33, 3, 6, 6), {"kernel_size": 3, "stride": 1}),
    "map kept, short rows": (
        "pool2d",
        (3, 7, 9, 27),
        {"kernel_size": 3, "stride": 1, "padding": 1},
    ),
    "map kept, one row": ("pool1d", (4, 5, 29), {"kernel_size": 5, "stride": 1, "padding": 2}),
    "channels, windows far apart": ("pool2d", (2, 19, 14, 29), {"kernel_size": (2, 9)}),
}
ADAPTIVE = {
    "divides the map": ((3, 5, 24, 35), (3, 7)),
    "unequal boxes, wide": ((1, 3, 5, 997), (2, 3)),
    "global": ((2, 70, 31, 47), (1, 1)),
    "global, few channels": ((3, 6, 31, 47), (1, 1)),
    "few channels": ((2, 3, 23, 29), (4, 5)),
    "tiny planes": ((2, 40, 11, 13), (3, 5)),
    "single rows": ((3, 7, 1, 197), (1, 9)),
    "global, channels in turns": ((2, 150, 11, 9), (1, 1)),
    "channels, large windows": ((2, 83, 17, 15), (2, 2)),
    "short rows, wide": ((3, 5, 1, 77), (1, 2)),
    "more outputs than inputs": ((3, 7, 5, 3), (7, 8)),
}


def _inputs(size: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """One in each layout."""
    return [t.requires_grad_() for t in _inputs_of(torch.randn(size).to(dtype))]


def _inputs_of(x: torch.Tensor) -> list[torch.Tensor]:
    """`x` in each layout."""
    if x.dim() <= 3:
        return [x]
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return [x, x.contiguous(memory_format=last)]


def _ops(name: str, dtype: torch.dtype) -> list[str]:
    """Those that torch has: no 3-d average of half types."""
    halves = dtype in (torch.bfloat16, torch.float16)
    return [f"max_{name}"] + ([] if name == "pool3d" and halves else [f"avg_{name}"])


@pytest.mark.parametrize("problem", PROBLEMS)
@each_dtype
def test_paths(problem: str, dtype: torch.dtype) -> None:
    name, size, window = PROBLEMS[problem]
    for x in _inputs(size, dtype):
        for op in _ops(name, dtype):
            check_against_native(getattr(W, op), getattr(F, op), x, **window)


@pytest.mark.parametrize("problem", ADAPTIVE)
@each_dtype
def test_adaptive_paths(problem: str, dtype: torch.dtype) -> None:
    size, output_size = ADAPTIVE[problem]
    for x in _inputs(size, dtype):
        check_against_native(W.adaptive_max_pool2d, F.adaptive_max_pool2d, x, output_size)
        check_against_native(W.adaptive_avg_pool2d, F.adaptive_avg_pool2d, x, output_size)


@pytest.mark.parametrize("target", _C.available_cpu_targets())
@pytest.mark.parametrize("problem", PROBLEMS)
def test_paths_on_every_target(problem: str, target: str) -> None:
    name, size, window = PROBLEMS[problem]
    with cpu_target(target):
        for dtype in (torch.float32, torch.bfloat16):
            for x in _inputs(size, dtype):
                for op in _ops(name, dtype):
                    check_against_native(getattr(W, op), getattr(F, op), x, **window)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_threads_do_not_change_bits(problem: str) -> None:
    name, size, window = PROBLEMS[problem]
    before = torch.get_num_threads()
    try:
        for x in _inputs(size, torch.float32):
            for op in _ops(name, torch.float32):
                results = []
                for threads in (1, 2, 3, 5):
                    torch.set_num_threads(threads)
                    with torch.no_grad():
                        alone = getattr(W, op)(x, **window)
                    y = getattr(W, op)(x, **window)
                    torch.manual_seed(0)
                    (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
                    results.append((alone, y, grad))
                for result in results[1:]:
                    assert all(map(torch.equal, result, results[0]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_compared_as_integers(dtype: torch.dtype) -> None:
    """Zeros of both signs, infinities, NaNs of both signs and the smallest numbers."""
    specials = torch.tensor([0x0000, 0x8000, 0x0001, 0x8001, 0x7C00, 0xFC00, 0x7F80, 0xFF80])
    nans = torch.tensor([0x7FC1, 0xFFC1])
    generator = torch.Generator().manual_seed(5)
    for values in (specials, torch.cat([specials, nans])):
        picks = torch.randint(len(values), (3, 2, 19, 43), generator=generator)
        x = values[picks].to(torch.uint16).view(dtype)
        for kernel, stride in ((2, 2), (3, 1), (3, 2), (5, 3), (9, 1)):
            y, native = W.max_pool2d(x, kernel, stride), F.max_pool2d(x, kernel, stride)
            assert torch.equal(y.isnan(), native.isnan())
            assert torch.equal(y.nan_to_num(), native.nan_to_num())


def test_outputs_past_the_cache() -> None:
    """Larger than `kPoolStreamBytes`, at an address that no vector is aligned to."""
    for stride in (1, 2):
        padded = torch.randn(4 * 1_500_001 * stride + 1)[1:].view(4, -1)
        x = padded[None]
        for name in ("max_pool1d", "avg_pool1d"):
            y = getattr(W, name)(x, 2, stride)
            assert torch.equal(y, getattr(F, name)(x, 2, stride))


SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, 1.0, -1.0]


def _path(op: Any, x: torch.Tensor, **window: Any) -> str:
    (plan,) = weft.explain(op, x, target=_C.cpu_target(), **window)
    return plan.path


@pytest.mark.parametrize("target", _C.available_cpu_targets())
def test_maps_that_keep_their_size(target: str) -> None:
    """Rows shorter and longer than vectors, so that borders fall on every lane."""
    square = {"kernel_size": 3, "stride": 1, "padding": 1}
    tall = {"kernel_size": (5, 3), "stride": 1, "padding": (2, 1)}
    x = torch.randn(2, 5, 4, 28)
    assert _path(W.max_pool2d, x, **square) == _path(W.avg_pool2d, x, **tall) == "flat"
    with cpu_target(target):
        for width in range(17, 50):
            for dtype in (torch.float32, torch.float64, torch.float16):
                for window, height in ((square, 1), (square, 4), (tall, 3)):
                    for x in _inputs_of(torch.randn(2, 5, height, width).to(dtype)):
                        y = W.max_pool2d(x, **window)
                        assert torch.equal(y, F.max_pool2d(x, **window))
                        check_against_native(W.avg_pool2d, F.avg_pool2d, x, **window)


LANES: dict[str, tuple[int, tuple[int, ...], dict[str, Any]]] = {
    "overlapping": (2, (3, 7, 9, 11), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "touching, ceil": (2, (2, 17, 7, 5), {"kernel_size": (2, 3), "ceil_mode": True}),
    "many parts": (2, (1, 33, 29, 23), {"kernel_size": (5, 2), "stride": 2, "padding": (2, 1)}),
    "long rows": (1, (2, 19, 77), {"kernel_size": 7, "stride": 2, "padding": 3}),
    "few elements": (1, (5, 9, 3), {"kernel_size": 2, "stride": 1}),
    "depth": (3, (2, 11, 5, 6, 3), {"kernel_size": (3, 2, 2), "stride": (2, 1, 2), "padding": 1}),
    "windows over 256": (2, (1, 48, 17, 18), {"kernel_size": 17, "stride": 5, "padding": 8}),
}


@pytest.mark.parametrize("target", _C.available_cpu_targets())
@pytest.mark.parametrize("problem", LANES)
def test_planes_in_lanes(problem: str, target: str) -> None:
    """Planes that do not fill the last vector, and places among ties, NaN and infinities."""
    rank, size, window = LANES[problem]
    pooled, native = getattr(W, f"max_pool{rank}d"), getattr(F, f"max_pool{rank}d")
    assert _path(pooled, torch.randn(size), **window) == "lanes"
    with cpu_target(target):
        for dtype in DTYPES:
            x = torch.randn(size).to(dtype)
            check_against_native(pooled, native, x, **window)
            if rank < 3 or dtype in (torch.float32, torch.float64):
                for inside in (False, True):
                    options = {**window, "count_include_pad": inside}
                    mean = getattr(W, f"avg_pool{rank}d"), getattr(F, f"avg_pool{rank}d")
                    check_against_native(*mean, x, **options)
            special = torch.tensor(SPECIAL, dtype=dtype)[torch.randint(len(SPECIAL), size)]
            for dilation in (1, 2) if max(size[2:]) > 19 else (1,):
                options = {**window, "dilation": dilation, "return_indices": True}
                y, indices = pooled(special, **options)
                expected, expected_indices = native(special, **options)
                torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
                assert torch.equal(indices, expected_indices)


def test_maps_that_keep_their_size_hold_special_values() -> None:
    x = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (3, 4, 7, 30))]
    for dtype in DTYPES:
        for kernel, padding, dilation in ((3, 1, 1), ((3, 1), (1, 0), 1), ((1, 2), (0, 1), (1, 2))):
            for t in _inputs_of(x.to(dtype)):
                window = {"stride": 1, "padding": padding, "dilation": dilation}
                window["kernel_size"] = kernel
                y, native = W.max_pool2d(t, **window), F.max_pool2d(t, **window)
                torch.testing.assert_close(y, native, rtol=0, atol=0, equal_nan=True)


FROM_MEMORY: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "flat": ("pool2d", (2, 64, 190, 190), {"kernel_size": 3, "stride": 1, "padding": 1}),
    "flat, few channels": (
        "pool2d",
        (2, 5, 700, 701),
        {"kernel_size": 3, "stride": 1, "padding": 1},
    ),
    "pixels": ("pool2d", (2, 72, 180, 190), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "pixels, ceil": ("pool2d", (1, 160, 181, 190), {"kernel_size": 2, "ceil_mode": True}),
    "pixels, wide": ("pool2d", (2, 33, 260, 270), {"kernel_size": (2, 5), "stride": (1, 3)}),
    "pixels, depth": ("pool3d", (1, 64, 8, 95, 97), {"kernel_size": 2, "stride": 2}),
}


@pytest.mark.parametrize("problem", FROM_MEMORY)
def test_channels_from_memory(problem: str) -> None:
    """Channels-last maps that are larger than the cache, and outputs that are streamed past it."""
    name, size, window = FROM_MEMORY[problem]
    for dtype in (torch.float32, torch.bfloat16):
        x = _inputs_of(torch.randn(size).to(dtype))[1]
        if x.nbytes >= 1 << 24:
            assert _path(getattr(W, f"max_{name}"), x, **window) == problem.split(",")[0]
        with torch.no_grad():
            for op in _ops(name, dtype):
                check_against_native(getattr(W, op), getattr(F, op), x, **window)


LARGE_WINDOWS: dict[str, tuple[int, tuple[int, ...], tuple[Any, ...]]] = {
    "rows": (2, (2, 9, 21, 40), (5, 2, 2)),
    "rows, dilated": (2, (2, 9, 30, 40), ((5, 4), (3, 2), 2, (2, 3))),
    "strips": (2, (2, 9, 37, 34), (13, 1, 6)),
    "strips, dilated": (2, (1, 9, 60, 34), ((13, 3), (1, 2), (6, 1), (2, 1))),
    "depth": (3, (1, 5, 6, 13, 21), ((2, 5, 7), (2, 1, 3), (1, 2, 3))),
    "tiny maps": (3, (2, 9, 7, 5, 6), ((3, 5, 5), 1, (1, 2, 2))),
    "single row": (1, (2, 5, 333), (17, 5, 8)),
    "the map": (2, (2, 83, 9, 8), ((9, 8), 1)),
}


@pytest.mark.parametrize("problem", LARGE_WINDOWS)
@each_dtype
def test_places_of_large_windows(problem: str, dtype: torch.dtype) -> None:
    """The first of equal elements and the last NaN, as torch, for few and for many special ones."""
    rank, size, window = LARGE_WINDOWS[problem]
    weft_op, native = getattr(W, f"max_pool{rank}d"), getattr(F, f"max_pool{rank}d")
    for distinct in (3, 40):
        x = torch.randint(-distinct, distinct, size).to(dtype)
        odd = torch.rand(size) < 2 / distinct**2
        x[odd] = torch.tensor(SPECIAL, dtype=dtype)[torch.randint(len(SPECIAL), (int(odd.sum()),))]
        for t in _inputs_of(x):
            y, indices = weft_op(t, *window, return_indices=True)
            expected, expected_indices = native(t, *window, return_indices=True)
            torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(indices, expected_indices)
