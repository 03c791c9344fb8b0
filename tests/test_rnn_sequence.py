"""All steps of a recurrent layer in one CUDA kernel: when it is chosen, and that it is right.

The tests of layers and variants run it as well, wherever the device of host execution holds the
weights; here it is compared with the kernels of single steps, at the edges of its plans.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import weft.nn
import weft.testing
from harness import check_against_native
from test_rnn_variants import CELLS, layer, masks, plain, problem
from weft import _C

SEQUENCE = {"recurrent_layer_sequence", "recurrent_layer_sequence_backward"}


def plan(cell: str = "lstm", **problem: Any) -> dict[str, Any] | None:
    sizes = {"bytes": 4, "steps": 100, "batch": 16, "hidden": 256}
    return _C.sequence_plan(cell=cell, **{**sizes, **problem})


# ---- the plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("bytes", [2, 4, 8])
@pytest.mark.parametrize("batch", [1, 3, 16, 64, 200])
@pytest.mark.parametrize("hidden", [1, 64, 333, 768])
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before", "rnn_tanh"])
def test_plans_cover_the_problem_and_fit(
    cell: str, hidden: int, batch: int, bytes: int, backward: bool
) -> None:
    for projection in (0, 20) if cell == "lstm" else (0,):
        for multiprocessors in (1, 7, 132):
            found = plan(
                cell,
                hidden=hidden,
                batch=batch,
                bytes=bytes,
                backward=backward,
                projection=projection,
                multiprocessors=multiprocessors,
            )
            if found is None:
                continue
            assert found["unit_blocks"] * found["row_blocks"] <= multiprocessors
            assert found["unit_blocks"] * found["units"] >= hidden
            assert (found["unit_blocks"] - 1) * found["units"] < hidden
            assert found["row_blocks"] * found["rows"] >= batch
            assert (found["row_blocks"] - 1) * found["rows"] < batch
            assert 0 < found["staged_rows"] <= found["rows"]
            assert found["shared_bytes"] <= 227 * 1024
            assert found["threads"] % 32 == 0
            assert 32 <= found["threads"] <= 256


def test_weights_that_fit_stay() -> None:
    for hidden in (256, 512, 768, 1024):
        for bytes in (2, 4):
            for batch in (16, 64):
                for backward in (False, True):
                    assert plan(hidden=hidden, bytes=bytes, batch=batch, backward=backward)
    assert plan(hidden=2048) is None  # 64 MiB
    assert plan(hidden=256, multiprocessors=1) is None
    assert plan(hidden=256, multiprocessors=0) is None


def test_one_step_is_not_a_sequence() -> None:
    assert plan(steps=1) is None
    assert plan(steps=2) is not None


def test_small_layers_need_no_meeting() -> None:
    found = plan(hidden=32, batch=64)
    assert found is not None
    assert (found["unit_blocks"], found["units"]) == (1, 32)


def test_tensor_cores_take_half_types_of_many_rows() -> None:
    for batch, bytes, expected in [(16, 2, True), (64, 2, True), (4, 2, False), (64, 4, False)]:
        found = plan(hidden=768, batch=batch, bytes=bytes)
        assert found is not None
        assert found["tensor_cores"] is expected


# ---- the kernels ---------------------------------------------------------------------------------


def check(
    cell: str,
    kind: str,
    size: tuple[int, int, int, int],
    dtype: torch.dtype,
    multiprocessors: int,
) -> set[str]:
    """Against steps in torch's operations; returns the kernels that ran."""
    options = masks(cell, kind, size, dtype, "cpu")
    with weft.testing.host_execution(multiprocessors) as host:
        check_against_native(
            layer(cell, options), plain(cell, options), **problem(cell, size, dtype)
        )
        return {launch.kernel for launch in host.launches}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("multiprocessors", [0, 1, 3])
def test_matches_plain_steps(cell: str, multiprocessors: int) -> None:
    """By kernels a step, without and with other blocks to meet."""
    kernels = check(cell, "all", (3, 6, 3, 13), torch.float32, multiprocessors)
    steps = {"recurrent_layer_step", "recurrent_layer_gates_backward"}
    expected, others = (steps, SEQUENCE) if multiprocessors == 0 else (SEQUENCE, steps)
    assert kernels >= expected
    assert not kernels & others


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("size", [(3, 9, 5, 40), (2, 17, 3, 21)], ids=str)
def test_tensor_cores(cell: str, size: tuple[int, int, int, int]) -> None:
    """Rows and columns around their tiles, lengths around their depth."""
    dtype = torch.bfloat16 if size[0] == 3 else torch.float16
    assert check(cell, "resets", size, dtype, 1) >= SEQUENCE


def test_rows_that_do_not_fit_at_once() -> None:
    """Their states pass through shared memory in several parts."""
    for backward in (False, True):
        found = plan(
            "rnn_tanh",
            bytes=8,
            hidden=90,
            batch=70,
            steps=2,
            multiprocessors=1,
            backward=backward,
        )
        assert found is not None
        assert found["staged_rows"] < found["rows"]
    assert check("rnn_tanh", "plain", (2, 70, 2, 90), torch.float64, 1) >= SEQUENCE


def test_traffic_of_a_sequence() -> None:
    """Weights are read once, not once a step."""
    lstm = weft.nn.LSTM(4, 32)
    read = {}
    for steps in (4, 12):
        with weft.testing.host_execution() as host, torch.no_grad():
            lstm(torch.randn(steps, 2, 4))
        (launch,) = [r for r in host.launches if r.kernel == "recurrent_layer_sequence"]
        read[steps] = launch.bytes_loaded
    weights = 4 * 32 * 32 * 4
    assert read[4] > weights
    assert read[12] - read[4] < weights
