"""The memory of large CPU outputs: written again, never shared, bounded, seen by the profiler."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

import weft
from weft import memory
from weft.bench.measure import peak_bytes

MIB = 2**20


def rows(mib: int, value: float) -> torch.Tensor:
    return torch.full((1, 1, mib * MIB // 2), value)  # which pool to `mib` MiB


def pooled(x: torch.Tensor) -> torch.Tensor:
    return weft.functional.max_pool1d(x, 2)


@pytest.fixture(autouse=True)
def nothing_kept():
    weft.empty_cache()
    assert memory.kept_bytes() == 0
    yield
    weft.empty_cache()


def test_the_next_output_of_a_size_is_where_the_last_one_was():
    x = rows(8, 1.0)
    first = pooled(x)
    address = first.data_ptr()
    assert memory.kept_bytes() == 0
    del first
    assert memory.kept_bytes() == 8 * MIB
    second = pooled(x)
    assert second.data_ptr() == address
    assert memory.kept_bytes() == 0


def test_an_output_or_view_that_lives_is_not_written_again():
    x = rows(8, 1.0)
    view = pooled(x)[0, 0, -1:]
    other = pooled(rows(8, 2.0))
    assert view.item() == 1.0
    assert other.eq(2.0).all()


@pytest.mark.parametrize(("mib", "fits"), [(8, True), (7, True), (10, False), (6, False)])
def test_a_block_serves_sizes_to_a_fifth_below_its_own(mib, fits):
    del_me = pooled(rows(8, 1.0))
    del del_me
    output = pooled(rows(mib, 3.0))
    assert output.eq(3.0).all()
    assert memory.kept_bytes() == (0 if fits else 8 * MIB)


@pytest.mark.parametrize(
    ("elements", "kept_kib"), [(65535, 0), (65536, 256), (65537, 320), (300000, 1216)]
)
def test_blocks_below_a_huge_page_are_kept_in_small_steps(elements, kept_kib):
    x = torch.ones(1, 1, 2 * elements)
    first = pooled(x)
    address = first.data_ptr()
    del first
    assert memory.kept_bytes() == kept_kib * 1024
    second = pooled(x)
    assert second.eq(1.0).all()
    assert (second.data_ptr() == address) or kept_kib == 0


def test_what_a_kernel_used_for_itself_is_kept():
    lstm = weft.nn.LSTM(8, 256)
    with torch.no_grad():
        results = lstm(torch.ones(2, 8, 8))
    assert memory.kept_bytes() >= lstm.weight_hh_l0.nbytes  # packed, for the time of the call
    assert results[0].shape == (2, 8, 256)


def test_gradients_are_kept_too():
    x = rows(8, 1.0).requires_grad_()
    pooled(x).sum().backward()
    address = x.grad.data_ptr()
    x.grad = None
    pooled(x).sum().backward()
    assert x.grad.data_ptr() == address
    assert x.grad.sum() == x.numel() // 2


def test_an_output_can_be_resized():
    output = pooled(rows(8, 1.0))
    output.resize_(1, 1, 4 * MIB)
    assert output[0, 0, : 2 * MIB].eq(1.0).all()


def test_outputs_of_several_threads_are_apart():
    def outputs_are_right(value):
        x = rows(4, float(value))
        return all(pooled(x).eq(value).all() for _ in range(20))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(outputs_are_right, range(8)))


def test_the_profiler_counts_an_output_that_was_kept():
    x = rows(8, 1.0)
    pooled(x)
    assert memory.kept_bytes() == 8 * MIB
    assert peak_bytes(partial(pooled, x), torch.device("cpu")) == 8 * MIB


@pytest.mark.parametrize(("limit_mib", "kept_mib"), [(0, 0), (8, 8), (11, 8), (12, 12)])
def test_no_more_is_kept_than_the_environment_says(limit_mib, kept_mib):
    program = """if True:
        import torch, weft
        from weft import memory
        outputs = [weft.functional.max_pool1d(torch.ones(1, 1, m * 2**19), 2) for m in (4, 8)]
        while outputs:
            outputs.pop(0)
        print(memory.kept_bytes() // 2**20)"""
    said = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"WEFT_KEPT_OUTPUTS_MB": str(limit_mib)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert int(said) == kept_mib
