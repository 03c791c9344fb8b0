"""The rows, the measuring, the report and the command line."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from weft import _C, facts
from weft.__main__ import main
from weft.bench import measure as measuring
from weft.bench import report
from weft.bench import rows as row_data
from weft.bench.measure import Ceilings, Effort, Problem, kept_bytes, measure, peak_bytes
from weft.bench.rows import (
    BlockRow,
    CellRow,
    ConvRow,
    Cost,
    LayerRow,
    LengthsRow,
    PlainRow,
    PoolRow,
    VariantRow,
    rows,
)
from weft.bench.steps import VARIANTS
from weft.bench.unlisted import GENERATORS, unlisted
from weft.testing import cpu_target

CPU = torch.device("cpu")
BRIEF = Effort(seconds=0.0, least=3, most=3)
REQUIRED_KEYS = {
    *("family", "op", "shape", "dtype", "layout", "direction", "device", "weft_s", "native_s"),
    *("ratio", "bytes", "flops", "fraction_of_ceiling", "peak_bytes", "native_peak_bytes"),
}
F32 = torch.float32
TINY = {
    "pool": PoolRow("max_pool2d", F32, "NHWC", True, (2, 3, 8, 8), 2, 2, 0),
    "conv": ConvRow("conv2d", F32, "NCHW", True, (2, 4, 6, 6), 8, 3, 1, 1, 1, 2),
    "rnn": CellRow("lstm_cell", F32, "", True, 2, 5),
}


@pytest.fixture
def tiny_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tiny row a family, measured as briefly as can be."""
    monkeypatch.setattr(row_data, "FAMILIES", {name: [row] for name, row in TINY.items()})
    monkeypatch.setattr(report, "FAMILIES", row_data.FAMILIES)
    monkeypatch.setattr(report, "QUICK", BRIEF)
    monkeypatch.setattr(measuring.Ceilings, "bytes_per_second", lambda self: 1e9)
    monkeypatch.setattr(measuring.Ceilings, "flops_per_second", lambda self, dtype: 1e10)


# ---- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("family", row_data.FAMILIES)
def test_rows_are_unique_and_some_are_quick(family: str, device: str) -> None:
    chosen = rows(family, torch.device(device))
    assert len({str(row) for row in chosen}) == len(chosen)
    quick = rows(family, torch.device(device), full=False)
    assert quick
    assert set(quick) < set(chosen) or family == "rnn"
    for row in chosen:
        assert row.family.split()[0] == family
        f, fb = row.cost("f"), row.cost("fb")
        assert 0 < f.bytes < fb.bytes
        assert 0 < f.flops < fb.flops


@pytest.mark.parametrize("family", TINY)
def test_rows_cost_what_their_tensors_hold(family: str) -> None:
    row = TINY[family]
    native = row.native()
    inputs = row.inputs()
    outputs = torch.utils._pytree.tree_leaves(native(*row.arguments(inputs)))
    held = sum(t.nbytes for t in (*inputs, *native.parameters(), *outputs))
    assert row.cost("f").bytes == held


def test_random_problems_come_from_the_seed() -> None:
    for family in GENERATORS:
        problems = unlisted(family, 60, seed=3)
        assert problems == unlisted(family, 60, seed=3)
        assert problems != unlisted(family, 60, seed=4)
        assert len({row.op for row in problems}) > 4
        for row in problems:
            assert row.family == family
            assert 0 < row.cost("f").bytes < row.cost("fb").bytes < 2.5e8
    with pytest.raises(ValueError, match="no random problems"):
        unlisted("sorting", 1, seed=0)


@pytest.mark.parametrize("family", GENERATORS)
def test_random_problems_cost_what_their_tensors_hold(family: str) -> None:
    problems = (row for row in unlisted(family, 60, seed=5) if row.cost("f").flops < 2e7)
    for row in itertools.islice(problems, 6):
        native, inputs = row.native(), row.inputs()
        if getattr(row, "padded", False):
            continue
        outputs = torch.utils._pytree.tree_leaves(native(*row.arguments(inputs)))
        held = sum(t.nbytes for t in (*inputs, *native.parameters(), *outputs))
        assert row.cost("f").bytes == held


@pytest.mark.parametrize("family", GENERATORS)
def test_random_problems_are_measured(family: str) -> None:
    row = min(unlisted(family, 60, seed=0), key=lambda row: row.cost("f").flops)
    ceilings = Ceilings(CPU)
    ceilings._bytes_per_second, ceilings._flops_per_second[row.dtype] = 1e9, 1e10
    for direction in row_data.DIRECTIONS:
        measured = measure(row, direction, CPU, ceilings, BRIEF)
        assert measured.keys() >= REQUIRED_KEYS
        assert measured["ratio"] > 0


def test_pool_cost_by_hand() -> None:
    # 1·1·4·4 in, 1·1·2·2 out, four bytes each; backward twice that and two bytes an output.
    row = PoolRow("max_pool2d", F32, "NCHW", True, (1, 1, 4, 4), 2, 2, 0)
    assert row.cost("f") == Cost(80, 16)
    assert row.cost("fb") == Cost(168, 20)
    average = dataclasses.replace(row, op="avg_pool2d")
    assert average.cost("fb") == Cost(160, 32)
    # A window of more than 256 elements needs more than a byte for the place of its maximum.
    large = PoolRow("max_pool2d", F32, "NCHW", True, (1, 1, 17, 17), 17, 17, 0)
    assert large.cost("fb").bytes == 2 * 4 * (289 + 1) + 2 * 4


@pytest.mark.parametrize("pooling", ["", "max", "avg"])
def test_a_fused_block_is_measured_against_its_layers(pooling: str) -> None:
    row = BlockRow("block", F32, "NHWC", True, (2, 4, 6, 6), 8, 3, 1, 1, 1, 2, pooling)
    native = row.native()
    x = row.inputs()[0]
    assert torch.equal(native(x), row.weft(native)(x))
    held = sum(t.nbytes for t in (x, *native.parameters(), native(x)))
    assert row.cost("f").bytes == held
    assert row.baseline != "PyTorch"


@pytest.mark.parametrize("op", ["lstm_peephole", "gru_layer_norm"])
def test_a_variant_is_measured_against_the_plain_layer(op: str) -> None:
    row = PlainRow(op, F32, "", True, 3, 4, 5)
    native = row.native()
    variant = row.weft(native)
    assert type(variant) is type(native)
    assert set(native.state_dict()) < set(variant.state_dict())
    assert row.baseline != "PyTorch"


def test_lengths_are_measured_against_the_full_batch() -> None:
    row = LengthsRow("gru", F32, "", True, 4, 4, 5)
    full, inputs = row.native(), row.inputs()
    found, whole = row.weft(full)(*inputs)[0], full(*inputs)[0]
    for i, length in enumerate(row.lengths.tolist()):
        assert torch.equal(found[:length, i], whole[:length, i])
        assert not found[length:, i].any()
    assert row.cost("f").flops == 2 * int(row.lengths.sum()) * 2 * 3 * 25
    assert row.baseline != "PyTorch"


def test_conv_cost_by_hand() -> None:
    # x 2·4·6·6 = 288, w 8·2·3·3 = 144, b 8, y 2·8·6·6 = 576; 18 multiply-adds an output.
    row = TINY["conv"]
    assert row.cost("f") == Cost(4 * (288 + 144 + 8 + 576), 2 * 18 * 576)
    backward = 4 * (576 + 288 + 144 + 288 + 144 + 8)
    assert row.cost("fb") == Cost(4 * (288 + 144 + 8 + 576) + backward, 3 * 2 * 18 * 576)


def test_cell_cost_by_hand() -> None:
    # x, h, c and h', c' of 2·5; weights 2·(20·5), biases 2·20.
    row = TINY["rnn"]
    assert row.cost("f") == Cost(4 * (50 + 240), 2 * 2 * 200)
    assert row.cost("fb").bytes == 4 * (50 + 240) + 4 * (20 + 30 + 200 + 30 + 240)
    assert CellRow("gru_cell", F32, "", True, 2, 5).cost("f").flops == 2 * 2 * 150


@pytest.mark.parametrize("op", ["lstm", "gru", "rnn"])
def test_layer_cost_by_hand(op: str) -> None:
    # x and y of 4·2·5, the last states; weights 2·(gates·5·5) and biases 2·(gates·5) a layer.
    gates, states = {"lstm": (4, 2), "gru": (3, 1), "rnn": (1, 1)}[op]
    row = LayerRow(op, F32, "", True, 4, 2, 5, 2)
    parameters, weights = 2 * gates * 60, 2 * gates * 50
    assert row.cost("f") == Cost(4 * (40 + parameters + 40 + 2 * states * 10), 2 * 8 * weights)
    assert row.cost("fb").bytes == row.cost("f").bytes + 4 * (40 + 40 + weights + 40 + parameters)
    assert row.cost("fbb").flops == 3 * row.cost("fb").flops
    padded = dataclasses.replace(row, batch=4, padded=True)
    assert padded.lengths.tolist() == [1, 1, 2, 3]
    assert padded.cost("f").flops == 2 * 7 * weights


@pytest.mark.parametrize("padded", [False, True])
def test_layer_rows_are_measured_in_every_direction(padded: bool) -> None:
    row = LayerRow("gru", F32, "", True, 3, 4, 5, padded=padded, twice=True)
    assert row.directions == ("f", "fb", "fbb")
    for direction in row.directions:
        problem = Problem(row, direction, CPU)
        ours, theirs = (problem.call(library)(0) for library in ("weft", "native"))
        flat = torch.utils._pytree.tree_leaves
        assert all(
            torch.allclose(a, b, atol=1e-4) for a, b in zip(flat(ours), flat(theirs), strict=False)
        )


def test_a_layer_that_weft_lacks_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="leaves Linear as it is"):
        TINY["pool"].weft(torch.nn.Linear(2, 2))


# ---- measuring -----------------------------------------------------------------------------------


def test_the_slower_call_takes_longer() -> None:
    small, large = torch.ones(1 << 8), torch.ones(1 << 18)
    calls = [lambda i: small.sin(), lambda i: large.sin()]
    fast, slow = measuring.time_in_turn(calls, CPU, Effort(0.02, 5, 20))
    assert 0 < fast.least <= fast.seconds < slow.least <= slow.seconds
    assert 5 <= fast.samples == slow.samples <= 20
    assert fast.spread >= 0


def test_calls_run_on_rotating_inputs() -> None:
    problem = Problem(TINY["pool"], "fb", CPU)
    assert len({t[0].data_ptr() for t in problem._inputs}) == len(problem._inputs) > 1
    call = problem.call("weft")
    gradients = [call(i)[0] for i in range(len(problem._inputs) + 1)]
    assert torch.equal(gradients[0], gradients[-1])


@pytest.mark.parametrize("op", VARIANTS)
def test_variants_are_their_steps(op: str) -> None:
    row = VariantRow(op, F32, "", True, 3, 2, 5)
    steps = row.native()
    found = row.weft(steps)(*(inputs := row.inputs()))
    torch.testing.assert_close(found[0], steps(*inputs)[0])


@pytest.mark.parametrize("direction", row_data.DIRECTIONS)
@pytest.mark.parametrize("family", TINY)
def test_both_libraries_do_the_same_work(family: str, direction: row_data.Direction) -> None:
    problem = Problem(TINY[family], direction, CPU)
    results = [problem.call(library)(0) for library in ("weft", "native")]
    torch.testing.assert_close(*results)


def test_peak_counts_what_is_alive_at_once() -> None:
    def call() -> torch.Tensor:
        first = torch.empty(1 << 20, dtype=torch.uint8)
        del first
        return torch.empty(1 << 19, dtype=torch.uint8)

    peak_bytes(call, CPU)
    assert peak_bytes(call, CPU) == 1 << 20
    assert peak_bytes(lambda: (call(), call()), CPU) == (1 << 20) + (1 << 19)


def test_kept_bytes_count_storages_once_and_no_parameters() -> None:
    x = torch.ones(16, requires_grad=True)
    weight = torch.ones(16, requires_grad=True)
    assert kept_bytes(lambda: x * weight, [weight]) == x.nbytes
    assert kept_bytes(lambda: x * x, []) == x.nbytes
    assert kept_bytes(lambda: x + weight, [weight]) == 0


def test_ceilings_are_measured_once() -> None:
    ceilings = Ceilings(CPU)
    assert 1e8 < ceilings.bytes_per_second() < 1e13
    assert ceilings.bytes_per_second() == ceilings.bytes_per_second()
    assert 1e8 < ceilings.flops_per_second(torch.float32) < 1e15
    found = ceilings.as_dict()
    assert set(found["matmul_flops_per_s"]) == {"float32"}
    # No product is faster; clocks may differ a little between the two.
    assert found["cpu_multiply_add_flops_per_s"] > 0.8 * found["matmul_flops_per_s"]["float32"]


def test_multiply_adds_are_counted() -> None:
    rounds = 1 << 12
    with cpu_target("baseline"):
        one = _C.multiply_adds(rounds)
        assert _C.multiply_adds(2 * rounds) == 2 * one
    assert one == 2 * rounds * 12 * 4 * torch.get_num_threads()


def test_a_row_that_fails_costs_no_other(
    tiny_rows: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_on_conv(row: Any, *arguments: Any) -> dict[str, Any]:
        if row.family == "conv":
            raise RuntimeError("launch failed")
        return measure(row, *arguments)

    monkeypatch.setattr(report, "measure", fails_on_conv)
    path = tmp_path / "bench.json"
    assert main(["bench", "--device", "cpu", "--json", str(path)]) == 1
    written = json.loads(path.read_text())
    assert {row["family"] for row in written["rows"]} == {"pool", "rnn"}
    assert len(written["failed"]) == 2
    assert all(line.endswith(": launch failed") for line in written["failed"])


class FailingRow(PoolRow):
    def inputs(self) -> tuple[torch.Tensor, ...]:
        raise RuntimeError("no inputs today")


class EndingRow(PoolRow):
    def inputs(self) -> tuple[torch.Tensor, ...]:
        os._exit(3)


@pytest.mark.parametrize(
    ("kind", "message"), [(FailingRow, "no inputs today"), (EndingRow, "terminated abruptly")]
)
def test_what_happens_in_a_rows_process_is_told(kind: type[PoolRow], message: str) -> None:
    row = kind(*dataclasses.astuple(TINY["pool"]))
    with pytest.raises(RuntimeError, match=message):
        measuring.time_row_apart(row, "f", CPU, BRIEF)


@pytest.mark.parametrize("apart", [True, False])
def test_a_row_measured(apart: bool, tiny_rows: None) -> None:
    row = measure(TINY["pool"], "fb", CPU, Ceilings(CPU), BRIEF, apart)
    assert row.keys() >= REQUIRED_KEYS
    assert row["ratio"] == row["native_s"] / row["weft_s"]
    assert row["fraction_of_ceiling"] == pytest.approx(row["bytes"] / 1e9 / row["weft_s"])
    # One byte a place, of 2·3·4·4 outputs; PyTorch keeps its input and eight bytes an output.
    assert row["kept_bytes"] == 96
    assert row["native_kept_bytes"] == 4 * 384 + 8 * 96


# ---- command line --------------------------------------------------------------------------------


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    targets = weft._C.available_cpu_targets()
    for word in (torch.__version__, *targets, "CUDA architectures", "host execution"):
        assert word in printed


def test_bench(tiny_rows: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file, plot_file = tmp_path / "new" / "result.json", tmp_path / "ratio.png"
    arguments = ["bench", "--device", "cpu", "--json", str(json_file), "--plot", str(plot_file)]
    assert main(arguments) == 0
    found: dict[str, Any] = json.loads(json_file.read_text())
    assert len(found["rows"]) == 2 * len(TINY)
    assert all(row.keys() >= REQUIRED_KEYS for row in found["rows"])
    assert found["machine"]["instruction_set"]
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert plot_file.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert re.search(r"conv fb: \d+\.\d\dx the speed of PyTorch", printed)


def test_bench_of_one_family(tiny_rows: None, tmp_path: Path) -> None:
    json_file = tmp_path / "result.json"
    assert main(["bench", "rnn", "--device", "cpu", "--json", str(json_file)]) == 0
    assert {row["family"] for row in json.loads(json_file.read_text())["rows"]} == {"rnn"}


def test_command_line_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "attention"])
    assert stop.value.code == 2
    assert "invalid choice: 'attention'" in capsys.readouterr().err
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(SystemExit, match="cannot write"):
        main(["bench", "--json", str(blocked / "result.json")])
    if torch.device("cuda") not in facts.devices():
        with pytest.raises(SystemExit, match="device cuda is not there"):
            main(["bench", "--device", "cuda"])
