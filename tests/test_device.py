"""The device vocabulary: every word means what it says, and host execution catches each fault.

The words run on every backend that executes CUDA source; on a GPU the same tests prove that the
hardware means what the host executes. The faults are planted in csrc/device/faults.cpp.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

import weft.functional as W
import weft.testing
from device_words import POISON, check_fault, run, words_fixture

BLOCK = 64
WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
device = words_fixture(torch.cuda.is_available())


def elements(width: int, count: int, device: torch.device) -> Tensor:
    """`count` rows of `width` random bytes."""
    return torch.randint(0, 256, (count, width), dtype=torch.uint8).to(device)


# ---- words ---------------------------------------------------------------------------------------


def test_indices(device: torch.device) -> None:
    blocks = 3
    got = run("indices", torch.zeros(blocks * BLOCK, dtype=torch.int64, device=device))
    expected = []
    for block in range(blocks):
        for thread in range(BLOCK):
            code = 0
            for digit in (blocks, block, BLOCK, thread, thread % 32):
                code = code * 1000 + digit
            expected.append(code)
    assert got.tolist() == expected


def test_shared_memory(device: torch.device) -> None:
    x = torch.randint(-1000, 1000, (5, BLOCK), dtype=torch.int32, device=device)
    mirrored = torch.arange(BLOCK, dtype=torch.int32, device=device)
    assert torch.equal(run("shared", x), (x + mirrored).flip(1))


def test_barrier(device: torch.device) -> None:
    x = torch.randint(-1000, 1000, (5, BLOCK), dtype=torch.int32, device=device)
    assert torch.equal(run("barrier", x), x.cumsum(1).int())


LANES = torch.arange(32)
SOURCES = {
    "shuffle": (LANES * 5 + 3) % 32,
    "shuffle_xor": LANES ^ 9,
    "shuffle_down": torch.where(LANES + 5 < 32, LANES + 5, LANES),
    "shuffle_up": torch.where(LANES - 5 >= 0, LANES - 5, LANES),
}


@pytest.mark.parametrize("word", SOURCES)
@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
def test_shuffles(word: str, width: int, device: torch.device) -> None:
    x = elements(width, 2 * BLOCK, device)
    expected = x.view(-1, 32, width)[:, SOURCES[word].to(device)].view_as(x)
    assert torch.equal(run(f"{word}.{width}", x), expected)


def test_votes(device: torch.device) -> None:
    x = torch.zeros(4, 32, dtype=torch.int32)
    x[1] = 1
    x[2, 5] = -7
    x[3, [0, 31]] = 2
    x = x.to(device)
    bits = (x != 0).cpu().long() << torch.arange(32)
    assert torch.equal(run("ballot", x).cpu().long() & 0xFFFFFFFF, bits.sum(1, True).expand(-1, 32))
    any_expected = (x != 0).any(1, keepdim=True).int().expand(-1, 32)
    all_expected = (x != 0).all(1, keepdim=True).int().expand(-1, 32)
    assert torch.equal(run("any", x), any_expected)
    assert torch.equal(run("all", x), all_expected)


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
def test_load_and_store(width: int, device: torch.device) -> None:
    x = elements(width, 3 * BLOCK, device)
    assert torch.equal(run(f"load.{width}", x), x)


@pytest.mark.parametrize("width", [2, 4, 8, 16])
@pytest.mark.parametrize(("kind", "element"), [("bytes", 1), ("halves", 2), ("words", 4)])
def test_packs(kind: str, element: int, width: int, device: torch.device) -> None:
    if width <= element:
        with pytest.raises(ValueError, match="names no kernel"):
            run(f"pack_of_{kind}.{width}", elements(width, BLOCK, device))
        return
    x = elements(width, 3 * BLOCK, device)
    reversed_elements = x.view(-1, width // element, element).flip(1).view_as(x)
    assert torch.equal(run(f"pack_of_{kind}.{width}", x), reversed_elements)


@pytest.mark.parametrize("width", [4, 8, 16])
def test_asynchronous_copies(width: int, device: torch.device) -> None:
    x = elements(width, 2 * 4 * BLOCK, device)
    assert torch.equal(run(f"cp_async.{width}", x), x.view(-1, BLOCK, width).flip(1).view_as(x))


@pytest.mark.parametrize("width", [4, 8, 16])
def test_asynchronous_copies_or_zeros(width: int, device: torch.device) -> None:
    x = elements(width, 3 * BLOCK, device)
    blocks = x.view(-1, 2, BLOCK // 2, width)
    moved = torch.stack([blocks[:, 1], torch.zeros_like(blocks[:, 1])], 1)
    expected = moved.view(-1, BLOCK, width).flip(1).view_as(x)
    assert torch.equal(run(f"cp_async_or_zero.{width}", x), expected)


def test_zeros_are_not_traffic() -> None:
    x = elements(16, 3 * BLOCK, torch.device("cpu"))
    with weft.testing.host_execution() as host:
        run("cp_async_or_zero.16", x)
    (launch,) = host.launches
    assert launch.bytes_loaded == 3 * BLOCK // 2 * 16


# ---- tensor cores: the index formulas of the PTX manual, "Warp-level matrix instructions" --------


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed: bool, device: torch.device) -> None:
    x = torch.randint(-(2**15), 2**15, (2 * BLOCK, 8), dtype=torch.int16, device=device)
    # Lane l points at row (5 l + 3) % 32; rows 8 i to 8 i + 7 in the order of lanes are matrix i.
    matrices = x.view(-1, 32, 8)[:, SOURCES["shuffle"].to(device)].view(-1, 4, 8, 8)
    if transposed:
        matrices = matrices.transpose(2, 3)
    # Word i of lane l: elements 2 (l % 4) and the next of row l / 4 of matrix i.
    expected = matrices.reshape(-1, 4, 32, 2).transpose(1, 2).reshape(x.shape)
    assert torch.equal(run("ldmatrix_transposed" if transposed else "ldmatrix", x), expected)


LANE_GROUP, LANE_IN_GROUP = LANES // 4, LANES % 4
HALVES = torch.arange(8)[:, None]  # the elements of `a` that a lane holds
# dtype, (m, n, k), row and column of a's elements, k and column of b's; [elements, lanes] each.
MMA: dict[str, tuple[torch.dtype, tuple[int, int, int], Tensor, Tensor, Tensor, Tensor]] = {}
for _word, _dtype in {"bf16": torch.bfloat16, "f16": torch.float16}.items():
    MMA[_word] = (
        _dtype,
        (16, 8, 16),
        LANE_GROUP + 8 * ((HALVES // 2) % 2),
        LANE_IN_GROUP * 2 + HALVES % 2 + 8 * (HALVES // 4),
        LANE_IN_GROUP * 2 + HALVES[:4] % 2 + 8 * (HALVES[:4] // 2),
        LANE_GROUP.expand(4, 32),
    )
MMA["tf32"] = (
    torch.float32,
    (16, 8, 8),
    LANE_GROUP + 8 * (HALVES[:4] % 2),
    LANE_IN_GROUP + 4 * (HALVES[:4] // 2),
    LANE_IN_GROUP + 4 * HALVES[:2],
    LANE_GROUP.expand(2, 32),
)
MMA["f64"] = (
    torch.float64,
    (8, 8, 4),
    LANE_GROUP[None],
    LANE_IN_GROUP[None],
    LANE_IN_GROUP[None],
    LANE_GROUP[None],
)


def record(fragments: list[Tensor]) -> Tensor:
    """64 bytes a lane: a at 0, b at 16, c at 32. Fragments are [warps, elements, lanes]."""
    out = torch.zeros(fragments[0].shape[0], 32, 64, dtype=torch.uint8)
    for place, fragment in zip((0, 16, 32), fragments, strict=True):
        lanes = fragment.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        raw = lanes.view(torch.uint8)
        out[..., place : place + raw.shape[2]] = raw
    return out


@pytest.mark.parametrize("word", MMA)
def test_mma(word: str, device: torch.device) -> None:
    dtype, (m, n, k), a_row, a_column, b_k, b_column = MMA[word]
    warps = 4
    a = torch.randint(-8, 9, (warps, m, k)).to(dtype)
    b = torch.randint(-8, 9, (warps, k, n)).to(dtype)
    sums = torch.float64 if word == "f64" else torch.float32
    c = torch.randint(-8, 9, (warps, m, n)).to(sums)
    values = torch.arange(m * n // 32)[:, None]
    c_row = LANE_GROUP + 8 * (values // 2)
    c_column = LANE_IN_GROUP * 2 + values % 2
    x = record([a[:, a_row, a_column], b[:, b_k, b_column], c[:, c_row, c_column]])
    got = run(f"mma.{word}", x.to(device)).cpu()
    assert (got[..., 16:] == 0).all()
    expected = c + 2 * (a.to(sums) @ b.to(sums))
    lanes = got[..., :16].contiguous().view(sums).transpose(1, 2)
    assert torch.equal(lanes, expected[:, c_row, c_column])


def test_mma_of_tf32_reads_19_bits(device: torch.device) -> None:
    _, (m, n, k), a_row, a_column, b_k, b_column = MMA["tf32"]
    a = torch.randint(-8, 9, (2, m, k)).float()
    b = torch.randint(-8, 9, (2, k, n)).float()
    # The 13 low bits of an operand are not seen.
    noisy = (a.view(torch.int32) | torch.randint(0, 2**13, a.shape, dtype=torch.int32)).view(
        torch.float32
    )
    c = torch.zeros(2, 4, 32)
    clean, dirty = (
        run("mma.tf32", record([t[:, a_row, a_column], b[:, b_k, b_column], c]).to(device))
        for t in (a, noisy)
    )
    assert torch.equal(clean, dirty)


def test_rounding_to_tf32(device: torch.device) -> None:
    ties = torch.tensor([1 + 2**-11, -1 - 2**-11, 1 + 3 * 2**-11, 0.0, -0.0, torch.inf, -torch.inf])
    x = torch.cat([ties, torch.randn(2 * BLOCK - len(ties)) * 1e3])
    got = run("to_tf32", x.to(device)).cpu().view(torch.int32)
    magnitude = (x.view(torch.int32) & 0x7FFFFFFF) + 0x1000
    expected = (magnitude & 0x7FFFE000) | (x.view(torch.int32) & ~0x7FFFFFFF)
    assert torch.equal(got & ~0x1FFF, expected)
    nans = run("to_tf32", torch.full((BLOCK,), torch.nan, device=device)).view(torch.float32)
    assert nans.isnan().all()


# ---- blocks that meet -----------------------------------------------------------------------


def _met(x: Tensor, members: int) -> Tensor:
    """What blocks that add their neighbour's values three times come to."""
    for _ in range(3):
        x = x + x.unflatten(0, (-1, members)).roll(-1, 1).flatten(0, 1)
    return x


@pytest.mark.parametrize(("word", "members"), [("grid_barrier", 6), ("set_barrier", 2)])
def test_blocks_meet(word: str, members: int, device: torch.device) -> None:
    x = torch.randint(-1000, 1000, (6 + 1, BLOCK), dtype=torch.int32, device=device)
    assert torch.equal(run(word, x)[:-1], _met(x[:-1], members))


def test_cluster(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        with pytest.raises(RuntimeError, match="launch of cluster failed"):
            run("cluster", torch.zeros(8 * BLOCK, dtype=torch.int32, device=device))
        return
    x = torch.randint(-1000, 1000, (2, 4, BLOCK), dtype=torch.int32, device=device)
    mirrored = x.flip(2)
    expected = sum((d + 1) * mirrored.roll(-d, 1) for d in range(4))
    assert torch.equal(run("cluster", x), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
def test_blocks_that_meet_in_a_graph() -> None:
    x = torch.randint(-1000, 1000, (7, BLOCK), dtype=torch.int32, device="cuda")
    run("grid_barrier", x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run("grid_barrier", x)
    for _ in range(3):
        graph.replay()
        assert torch.equal(got[:-1], _met(x[:-1], 6))


def test_unknown_word(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"device_selftest: argument 'word' names no kernel"):
        run("levitate", torch.zeros(BLOCK, dtype=torch.int32, device=device))


def test_words_do_not_run_on_the_cpu_target() -> None:
    with pytest.raises(RuntimeError, match=r"must be a CUDA tensor or the call be inside"):
        run("barrier", torch.zeros(BLOCK, dtype=torch.int32))


# ---- planted faults ------------------------------------------------------------------------------

# What the message says after "kernel <name>".
FAULTS = {
    "missing_barrier": r", block 0, thread 0: output 0 depends on the order in which threads run "
    r"\(first at byte 0 of 512\); is a barrier missing\?",
    "missing_second_barrier": r", block \d, thread \d+: output 0 depends on the order",
    "order_of_arrival": r", block 0, thread \d+: output 0 depends on the order",
    "block_order": r", block 1, thread 0: output 0 depends on the order .*first at byte 256 of 512",
    "copies_in_flight": r", block 0, thread 0: finishes with asynchronous copies not waited for",
    "misaligned_copy": r", block 0, thread 0: cp_async to shared memory .* aligned to 8 bytes "
    r"meets one that is off by 4",
    "copy_outside_shared": r", block 0, thread 63: copies 4 bytes to outside shared memory",
    "store_after_shared": r", block 0, thread 17: stores outside piece 0 of shared memory "
    r"\(256 bytes\)",
    "store_before_shared": r", block 0, thread 0: stores outside piece 0 of shared memory",
    "unequal_pieces": r", block 0, thread 9: takes 32 bytes of shared memory where another thread "
    r"took 64",
    "too_much_shared": r", block 0, thread 0: takes 260 bytes of shared memory, the launch "
    r"gave 256",
    "more_shared_than_a_block_has": r": 233472 bytes of shared memory; a block has at most 232448",
    "store_outside_output": r", block 1, thread 63: stores 4 bytes outside the launch's outputs",
    "raw_store_after_output": r", block 1, thread 5: stores outside output 0 \(512 bytes\)",
    "raw_store_before_output": r", block 1, thread 5: stores outside output 0 \(512 bytes\)",
    "misaligned_pack": r", block 0, thread 0: load_pack .* aligned to 8 bytes meets one "
    r"that is off by 4",
    "misaligned_load": r", block 0, thread 0: load .* aligned to 4 bytes meets one that is "
    r"off by 1",
    "skipped_barrier": r", block 0: not all threads reach the same word: threads 60-63 finished; "
    r"threads 0-59 wait at the barrier of faults\.cpp:\d+",
    "two_barriers": r", block 0: not all threads reach the same word: threads 0-31 wait at the "
    r"barrier of faults\.cpp:\d+; threads 32-63 wait at the barrier of faults\.cpp:\d+",
    "lost_lane": r", block 0: not all threads reach the same word: threads 0-31, 40 finished; "
    r"threads 32-39, 41-63 wait in the warp exchange of faults\.cpp:\d+",
    "mixed_exchange": r", block 0: not all threads reach the same word: threads 32-63 are on their "
    r"way; threads 0-15 wait in the warp exchange of faults\.cpp:\d+; threads 16-31 wait in the "
    r"warp exchange of faults\.cpp:\d+",
    "barrier_against_exchange": r", block 0: not all threads reach the same word: threads 31, "
    r"63 wait at the barrier of faults\.cpp:\d+; threads 0-30, 32-62 wait in the warp exchange",
    "lost_mma_lane": r", block 0: not all threads reach the same word: threads 0-31, 40 finished; "
    r"threads 32-39, 41-63 wait in the warp exchange of faults\.cpp:\d+",
    "misaligned_ldmatrix": r", block 0, thread 0: ldmatrix .* aligned to 16 bytes meets one that "
    r"is off by 8",
    "ldmatrix_outside_shared": r", block 0, thread 16: reads 16 bytes from outside shared memory",
    "ldmatrix_without_barrier": r", block \d, thread \d+: output 0 depends on the order",
    "missing_grid_barrier": r", block \d, thread \d+: output 0 depends on the order",
    "too_small_a_set": r", block \d, thread \d+: output 0 depends on the order",
    "skipped_grid_barrier": r", block 1: not all blocks reach the same word: it finished; "
    r"block 0 waits at the grid barrier of faults\.cpp:\d+",
    "half_a_grid_barrier": r", block 1: not all threads reach the same word: threads 32-63 "
    r"finished; threads 0-31 wait at the grid barrier of faults\.cpp:\d+",
    "two_grid_barriers": r", block 1: not all blocks reach the same word: it waits at the grid "
    r"barrier of faults\.cpp:\d+; block 0 waits at the grid barrier of faults\.cpp:\d+",
    "grid_barrier_of_a_plain_launch": r", block 0, thread 0: meets a grid barrier in a launch "
    r"that is not cooperative",
    "missing_cluster_barrier": r", block \d, thread \d+: output 0 depends on the order",
    "early_end": r", block \d, thread \d+: output 0 depends on the order",
    "late_start": r", block 0, thread 0: looks into shared memory that block 1 has not taken",
    "skipped_cluster_barrier": r", block 0: not all blocks reach the same word: it finished; "
    r"block 1 waits at the cluster barrier of faults\.cpp:\d+",
    "odd_cluster": r": clusters of 3 in a grid of 2 blocks; expected a divisor of it, at most 8",
    "odd_threads": r": 48 threads a block; expected a multiple of 32, at most 1024",
    "too_many_threads": r": 2048 threads a block; expected a multiple of 32, at most 1024",
    "foreign_output": r" is given an output that weft did not allocate",
}


@pytest.fixture
def two_blocks() -> Tensor:
    return torch.arange(2 * BLOCK, dtype=torch.int32).add_(100).view(2, BLOCK)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught_and_named(fault: str, two_blocks: Tensor) -> None:
    check_fault(fault, FAULTS[fault], two_blocks)


@pytest.mark.parametrize("fault", ["early_shared_read", "early_copy_read", "copy_group_pending"])
def test_early_read_sees_poison(fault: str, two_blocks: Tensor) -> None:
    with weft.testing.host_execution():
        assert (run(fault, two_blocks) == POISON).all()


def test_more_blocks_than_run_at_once() -> None:
    blocks = weft.testing.HOST_MULTIPROCESSORS * 32
    x = torch.zeros(blocks + 2, BLOCK, dtype=torch.int32)
    with weft.testing.host_execution():
        assert torch.equal(run("grid_barrier", x[1:])[:-1], x[2:])
        with pytest.raises(RuntimeError, match=f"{blocks + 1} blocks that wait .* runs {blocks} "):
            run("grid_barrier", x)


def test_unwritten_output_is_poison(two_blocks: Tensor) -> None:
    with weft.testing.host_execution():
        got = run("unwritten_output", two_blocks)
    expected = two_blocks.clone()
    expected[:, 3] = POISON
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_poison_is_nan_in_every_dtype(dtype: torch.dtype) -> None:
    poison = torch.full((4,), POISON, dtype=torch.int32)
    assert poison.view(dtype).isnan().all()


def test_a_kernel_without_faults_reports_none(two_blocks: Tensor) -> None:
    with weft.testing.host_execution() as host:
        run("barrier", two_blocks)
        with pytest.raises(RuntimeError):
            run("two_barriers", two_blocks)
    (launch,) = host.launches
    assert (launch.kernel, launch.blocks, launch.threads, launch.shared_bytes) == (
        "barrier",
        2,
        BLOCK,
        4 * BLOCK,
    )


# ---- traffic -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
def test_traffic_of_a_copy(width: int) -> None:
    x = elements(width, 3 * BLOCK, torch.device("cpu"))
    with weft.testing.host_execution() as host:
        run(f"load.{width}", x)
    (launch,) = host.launches
    count = 3 * BLOCK * width
    assert (launch.bytes_loaded, launch.bytes_stored) == (count, count)
    # torch and weft both allocate on 64-byte boundaries, so a block starts with a sector.
    assert (launch.sectors_loaded, launch.sectors_stored) == (count // 32, count // 32)
    assert launch.traffic == 2 * count


def test_traffic_counts_bytes_each_time_and_sectors_once_a_block() -> None:
    x = torch.zeros(2 * BLOCK, dtype=torch.int32)
    with weft.testing.host_execution() as host:
        run("load_rounds", x)
    (launch,) = host.launches
    assert launch.bytes_loaded == 2 * BLOCK * 100 * 4  # 100 loads a thread, all from x[:64]
    assert launch.sectors_loaded == 2 * BLOCK * 4 // 32  # that each of the two blocks meets once
    assert launch.sectors_stored == 2 * BLOCK * 4 // 32


def test_traffic_of_asynchronous_copies() -> None:
    x = elements(16, 4 * BLOCK, torch.device("cpu"))
    with weft.testing.host_execution() as host:
        run("cp_async.16", x)
    (launch,) = host.launches
    assert (launch.bytes_loaded, launch.bytes_stored) == (4 * BLOCK * 16, 4 * BLOCK * 16)
    assert launch.sectors_loaded == 4 * BLOCK * 16 // 32


def test_traffic_of_a_pooling() -> None:
    x = torch.randn(1, 1, 8, 8)
    with weft.testing.host_execution() as host:
        W.avg_pool2d(x, 2)
    (launch,) = host.launches
    assert (launch.bytes_loaded, launch.bytes_stored) == (64 * 4, 16 * 4)
    assert (launch.sectors_loaded, launch.sectors_stored) == (8, 2)


def test_an_unaligned_row_costs_a_sector_more() -> None:
    x = torch.randn(72)[1:65].view(1, 1, 8, 8)
    with weft.testing.host_execution() as host:
        W.avg_pool2d(x, 2)
    (launch,) = host.launches
    assert launch.sectors_loaded == 9


# ---- the process around it -----------------------------------------------------------------------


def test_blocks_nest_and_count_their_own_launches(two_blocks: Tensor) -> None:
    with weft.testing.host_execution() as outer:
        run("load.4", two_blocks)
        with weft.testing.host_execution() as inner:
            run("barrier", two_blocks)
        run("any", two_blocks)
        assert [r.kernel for r in outer.launches] == ["load.4", "barrier", "any"]
        assert [r.kernel for r in inner.launches] == ["barrier", "any"]
    with pytest.raises(RuntimeError, match="host_execution"):
        run("load.4", two_blocks)


def test_an_exception_closes_the_block(two_blocks: Tensor) -> None:
    with pytest.raises(RuntimeError, match="lost_lane"), weft.testing.host_execution():
        run("lost_lane", two_blocks)
    with pytest.raises(RuntimeError, match="host_execution"):
        run("load.4", two_blocks)


def test_an_output_outlives_the_block(two_blocks: Tensor) -> None:
    with weft.testing.host_execution():
        output = run("load.4", two_blocks)
    assert torch.equal(output + 1, two_blocks + 1)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_os_threads(threads: int) -> None:
    x = torch.randint(-9, 9, (37, BLOCK), dtype=torch.int32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with weft.testing.host_execution() as host:
            got = run("barrier", x)
            with pytest.raises(RuntimeError, match="kernel skipped_barrier, block 0:"):
                run("skipped_barrier", x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, x.cumsum(1).int())
    assert host.launches[0].bytes_loaded == x.numel() * 4


def test_launches_from_several_python_threads() -> None:
    results: dict[int, bool] = {}

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(-9, 9, (5, BLOCK), dtype=torch.int32, generator=generator)
        good = True
        for _ in range(10):
            good &= torch.equal(run("barrier", x), x.cumsum(1).int())
            try:
                run("lost_lane", x)
                good = False
            except RuntimeError as error:
                good &= "kernel lost_lane, block 0" in str(error)
        results[seed] = good

    with weft.testing.host_execution() as host:
        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert results == dict.fromkeys(range(4), True)
    assert len(host.launches) == 40


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(("word", "launches"), [("cp_async.16", 1000), ("lost_lane", 200)])
def test_memory_does_not_grow(word: str, launches: int) -> None:
    x = elements(16, 4 * BLOCK, torch.device("cpu"))

    def repeat(count: int) -> None:
        for _ in range(count):
            try:
                run(word, x)
            except RuntimeError as error:
                assert word in str(error)  # noqa: PT017 (raises() would keep the traceback's frames)

    with weft.testing.host_execution():
        repeat(launches)
        before = _resident_bytes()
        repeat(launches)
        grown = _resident_bytes() - before
    # Reports are kept, about 100 bytes each; a leaked output is 4 KiB, a leaked stack more.
    assert grown < launches * 2048, f"{grown} bytes more after {launches} launches"


def test_after_fork() -> None:
    """The child has none of the parent's OpenMP threads; weft's kernels run on, in one thread."""
    script = """
        import os, torch, weft.testing, weft.functional as W
        torch.set_num_threads(2)
        x = torch.randn(8, 16, 32, 32)
        word = torch.arange(512, dtype=torch.int32)
        selftest = torch.ops.weft.device_selftest
        with weft.testing.host_execution():
            selftest(word, "barrier")
        expected = W.max_pool2d(x, 2)
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # torch's own operators hang otherwise
            torch.set_num_threads(2)
            pooled = W.max_pool2d(x, 2)
            with weft.testing.host_execution():
                scanned = selftest(word, "barrier")
            torch.set_num_threads(1)
            sums = word.view(8, 64).cumsum(1).view(-1).int()
            os._exit(0 if pooled.equal(expected) and scanned.equal(sums) else 3)
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_after_fork_of_a_process_of_one_thread() -> None:
    """The child has nothing to wait for: weft's kernels take the threads that they are given."""
    script = """
        import os, torch, weft.functional as W
        threads = lambda: len(os.listdir("/proc/self/task"))
        assert threads() == 1
        child = os.fork()
        if child == 0:
            torch.set_num_threads(2)
            x = torch.randn(8, 16, 128, 128)
            before = threads()
            W.max_pool2d(x, 2)
            os._exit(0 if threads() == before + 1 else 3)
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_selftest_is_an_op_like_any_other(device: torch.device) -> None:
    x = torch.arange(BLOCK, dtype=torch.int32, device=device)
    torch.library.opcheck(torch.ops.weft.device_selftest.default, (x, "load.4"))
