"""Hopper's words of the device vocabulary: layouts, products, copies of boxes, and their faults.

As in test_device.py: on a GPU the same tests prove that the hardware means what the host executes.
The faults are planted in csrc/device/faults_hopper.cpp.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import weft.testing
from device_words import POISON, check_fault, run, words_fixture

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
device = words_fixture(HOPPER)


def padded(data: Tensor, bytes: int) -> Tensor:
    """`data` as bytes, with zeros behind it so that an output of `bytes` has the same size."""
    raw = data.contiguous().view(-1).view(torch.uint8)
    size = max(raw.numel(), bytes + 15) // 16 * 16 + 16
    return torch.cat([raw, torch.zeros(size - raw.numel(), dtype=torch.uint8)])


def swizzled(rows: Tensor) -> Tensor:
    """Rows of 64 elements of 16 bits as they lie in shared memory; it is its own inverse.

    The 16 bytes with index i of row r are found at index i ^ (r % 8).
    """
    chunks = rows.reshape(-1, 8, 8)
    index = torch.arange(8) ^ (torch.arange(chunks.shape[0]) % 8)[:, None]
    return chunks.gather(1, index[:, :, None].expand(-1, -1, 8)).view(rows.shape)


# ---- barriers that count ------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_mbarrier_ring(rounds: int, device: torch.device) -> None:
    x = torch.randint(-1000, 1000, (3, rounds, 32), dtype=torch.int32, device=device)
    assert torch.equal(run(f"mbarrier {rounds}", x), x.flip(2))


# ---- copies of boxes ----------------------------------------------------------------------------

# Extents, box, corner: fastest axis first; inside, across each border, and wholly outside.
TILES = {
    "plain": ((64, 16), (64, 16), (0, 0)),
    "inner": ((192, 40), (64, 8), (64, 3)),
    "few_channels": ((24, 9), (64, 4), (0, 2)),
    "past_the_end": ((72, 5, 6), (64, 1, 8), (64, 4, 2)),
    "before_the_begin": ((72, 5, 6), (64, 3, 4), (-8, -2, -3)),
    "outside": ((64, 3, 3), (64, 2, 2), (0, 3, 0)),
    "all_axes": ((72, 5, 4, 3), (64, 4, 3, 2), (16, -1, 2, 2)),
}


@pytest.mark.parametrize("tile", TILES)
def test_tma_load(tile: str, device: torch.device) -> None:
    extents, box, corner = TILES[tile]
    x = torch.randint(-(2**15), 2**15, extents[::-1], dtype=torch.int16)
    expected = torch.zeros(box[::-1], dtype=torch.int16)
    for place in itertools.product(*(range(b) for b in box[1:][::-1])):
        at = [c + p for c, p in zip(corner[1:][::-1], place, strict=True)]
        if all(0 <= a < e for a, e in zip(at, extents[1:][::-1], strict=True)):
            for c in range(box[0]):
                if 0 <= corner[0] + c < extents[0]:
                    expected[(*place, c)] = x[(*at, corner[0] + c)]
    rank = len(extents)
    numbers = [rank]
    for axes, rest in ((extents, 1), (box, 1), (corner, 0)):
        numbers += [*axes, *[rest] * (4 - rank)]
    input = padded(x, expected.numel() * 2)
    word = " ".join(map(str, ["tma_load", *numbers]))
    got = run(word, input.to(device)).cpu().view(torch.int16)
    assert torch.equal(got[: expected.numel()].view(-1, 64), swizzled(expected.view(-1, 64)))
    assert (got[expected.numel() :] == 0).all()


@dataclass(frozen=True)
class Axis:
    """One axis of a walk of windows: extent, window, and the window and place a copy begins at."""

    extent: int
    size: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    first: int = 0
    place: int = 0

    @property
    def outputs(self) -> int:
        return (self.extent + 2 * self.padding - self.dilation * (self.size - 1) - 1) // (
            self.stride
        ) + 1


# Channels, images, the first channel and image, pixels, and axes, the fastest first.
WINDOWS = {
    "line": (64, 2, 0, 0, 20, [Axis(9, size=3, padding=1, place=2)]),
    "plain": (64, 1, 0, 0, 16, [Axis(4), Axis(4)]),
    "padded": (64, 2, 0, 0, 64, [Axis(5, 3, 1, 1, place=0), Axis(4, 3, 1, 1, place=2)]),
    "begins_inside": (72, 3, 64, 1, 40, [Axis(6, 3, 1, 1, first=3), Axis(5, 3, 1, 1, first=2)]),
    "strided": (64, 2, 0, 0, 24, [Axis(9, 3, 2, 1, place=1), Axis(7, 2, 3, 1, place=1)]),
    "dilated": (64, 2, 0, 1, 30, [Axis(9, 3, 1, 2, 2, place=2), Axis(8, 2, 2, 3, 3, place=1)]),
    "past_the_images": (64, 1, 0, 0, 48, [Axis(4, 3, 1, 1, first=2, place=1), Axis(3, 1)]),
    "volume": (64, 2, 0, 0, 70, [Axis(4, 3, 1, 1), Axis(3, 2, 2, 1, place=1), Axis(5, 3, 2, 1)]),
    "gaps": (64, 1, 0, 0, 9, [Axis(17, 2, 8, place=1), Axis(20, 1, 7)]),
}


@pytest.mark.parametrize("windows", WINDOWS)
def test_tma_load_im2col(windows: str, device: torch.device) -> None:
    channels, images, channel, image, pixels, axes = WINDOWS[windows]
    sizes = [images, *(a.extent for a in reversed(axes)), channels]
    x = torch.randint(-(2**15), 2**15, sizes, dtype=torch.int16)
    expected = torch.zeros(pixels, 64, dtype=torch.int16)
    walk = list(itertools.product(range(images), *(range(a.outputs) for a in reversed(axes))))
    first = walk.index((image, *(a.first for a in reversed(axes))))
    for row, (n, *outputs) in zip(expected, walk[first:], strict=False):
        at = [
            o * a.stride - a.padding + a.place * a.dilation
            for o, a in zip(outputs, reversed(axes), strict=True)
        ]
        if all(0 <= p < a.extent for p, a in zip(at, reversed(axes), strict=True)):
            found = x[(n, *at)][channel : channel + 64]
            row[: len(found)] = found
    numbers = [len(sizes), *reversed(sizes), *[1] * (5 - len(sizes)), pixels]
    for a in axes:
        upper = -a.padding + (a.outputs - 1) * a.stride - (a.extent - 1)
        base = a.first * a.stride - a.padding
        numbers += [-a.padding, upper, a.stride, base, a.place * a.dilation]
    numbers += [0, 0, 1, 0, 0] * (3 - len(axes)) + [channel, image]
    word = " ".join(map(str, ["tma_load_im2col", *numbers]))
    got = run(word, padded(x, expected.numel() * 2).to(device)).cpu().view(torch.int16)
    assert torch.equal(got[: expected.numel()].view(-1, 64), swizzled(expected))
    assert (got[expected.numel() :] == 0).all()


def test_zeros_of_a_box_are_not_traffic() -> None:
    x = torch.ones(6, 72, dtype=torch.int16)
    with weft.testing.host_execution() as host:
        run("tma_load 2 72 6 1 1 64 4 1 1 64 4 0 0", padded(x, 4 * 128))
    (launch,) = host.launches
    assert launch.bytes_loaded == 2 * 8 * 2  # two rows, eight channels each
    assert launch.sectors_loaded == 2


REFUSED = {
    "tma_load 2 60 6 1 1 64 4 1 1 0 0 0 0": "steps of a multiple of 16 bytes, .* got 120",
    "tma_load 2 64 6 1 1 32 4 1 1 0 0 0 0": "rows of 128 bytes, got 64",
    "tma_load 2 64 6 1 1 64 300 1 1 0 0 0 0": "1 to 256 on each axis, got 300",
    "tma_load 5 64 6 1 1 64 1 1 1 0 0 0 0": "another rank, got 5",
    "tma_load_im2col 4 64 6 6 1 1 9 -200 0 1 0 0 0 0 1 0 0 0 0 1 0 0 0 0": "limits .* got -200",
    "tma_load_im2col 4 64 6 6 1 1 9 0 0 9 0 0 0 0 1 0 0 0 0 1 0 0 0 0": "1 to 8, got 9",
    "tma_load_im2col 4 64 6 6 1 1 9 0 -6 1 0 0 0 0 1 0 0 0 0 1 0 0 0 0": "holds a window, got 0",
}


@pytest.mark.parametrize("word", REFUSED)
def test_maps_that_the_hardware_has_not_are_refused(word: str, device: torch.device) -> None:
    with pytest.raises(ValueError, match=f"weft: tensor map: expected .*{REFUSED[word]}"):
        run(word, torch.zeros(1024, dtype=torch.int16, device=device))


# ---- products of a warpgroup: the index formulas of the PTX manual ------------------------------


@pytest.mark.parametrize(
    ("major", "columns"),
    [
        (m, n)
        for m in ("", ".columns", ".both")
        for n in (8, 40, 64, 128, 256)
        if not m or n % 64 == 0
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_wgmma(dtype: torch.dtype, major: str, columns: int, device: torch.device) -> None:
    name = "bf16" if dtype == torch.bfloat16 else "f16"
    a = torch.randint(-8, 9, (2, 64, 64)).to(dtype)  # of two warpgroups: [row, k]
    b = torch.randint(-8, 9, (64, columns)).to(dtype)  # [k, column]
    # [piece of 64 columns, k, column], or [column, k]
    tile_b = b.view(64, -1, 64).transpose(0, 1) if major else b.t()
    tile_a = a.transpose(1, 2) if major == ".both" else a  # [warpgroup, k, row]
    tiles = torch.cat([swizzled(t.reshape(-1, 64)) for t in (tile_a, tile_b)])
    input = padded(tiles, 2 * 64 * columns * 4)
    raw = run(f"wgmma.{name}{major} {columns}", input.to(device)).cpu()
    got = raw[: 2 * 64 * columns * 4].view(torch.float32).view(2, 128, columns // 2)
    thread = torch.arange(128)[:, None]
    value = torch.arange(columns // 2)
    row = thread // 32 * 16 + thread % 32 // 4 + value // 2 % 2 * 8
    column = value // 4 * 8 + thread % 4 * 2 + value % 2
    expected = 2 * (a.float() @ b.float())
    assert torch.equal(got, expected[:, row, column])


# ---- planted faults -----------------------------------------------------------------------------

# What the message says after "kernel <name>, block 0".
FAULTS = {
    "lost_arrival": r": not all threads reach the same word: threads 32-127 finished; threads 0-31 "
    r"wait at the mbarrier of faults_hopper\.cpp:\d+",
    "extra_arrival": r", thread 9: arrives at an mbarrier that expects 1 arrivals in a phase, and "
    r"has them",
    "uninitialised_mbarrier": r", thread 0: uses an mbarrier that was not initialised",
    "missing_bytes": r": not all threads reach the same word: threads 0-127 wait at the mbarrier",
    "too_many_bytes": r", thread 0: brings 512 bytes to an mbarrier that expects 256",
    "boxes_in_flight": r": finishes with TMA copies that nobody waited for",
    "misaligned_box": r", thread 0: tma_load to shared memory .* aligned to 128 bytes meets one "
    r"that is off by 32",
    "unswizzled_box": r", thread 0: tma_load to a box that does not begin at a multiple of 1024",
    "box_outside_shared": r", thread 0: copies 512 bytes to outside shared memory",
    "window_outside_box": r", thread 0: tma_load_im2col from a window whose base -1 lies outside",
    "window_by_a_tile_map": r", thread 0: copies windows by a tensor map of other rank or kind",
    "lost_wgmma_warp": r": not all threads reach the same word: threads 96-127 finished; threads "
    r"0-95 wait at the wgmma of faults_hopper\.cpp:\d+",
    "unequal_wgmma": r", thread 77: meets another wgmma than thread 0 of its warpgroup",
    "misaligned_wgmma": r", thread 0: wgmma with an operand that begins 16 bytes behind a multiple "
    r"of 1024",
    "wgmma_outside_shared": r", thread 0: reads 8096 bytes from outside shared memory",
    "wgmma_without_fence": r", thread 127: meets wgmma on sums that it has touched, without a "
    r"wgmma_fence",
    "products_in_flight": r", thread 127: finishes with wgmma not waited for",
    "overwritten_operand": r", thread 0: waits for a wgmma whose operands have changed since",
}


@pytest.fixture
def numbers() -> Tensor:
    return torch.arange(128, dtype=torch.int32).add_(100)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught_and_named(fault: str, numbers: Tensor) -> None:
    check_fault(fault, f", block 0(?:{FAULTS[fault]})", numbers)


@pytest.mark.parametrize("fault", ["early_box_read", "early_sums"])
def test_early_read_sees_poison(fault: str, numbers: Tensor) -> None:
    with weft.testing.host_execution():
        assert (run(fault, numbers) == POISON).all()
