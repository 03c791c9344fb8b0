"""Launch plans and `weft.explain`: what would run, found without running it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import weft
import weft.functional as W
from weft import _C, nn
from weft.testing import host_execution


class Ceilings:
    """A device of round numbers."""

    def bytes_per_second(self) -> float:
        return 1e9

    def flops_per_second(self, dtype: torch.dtype) -> float:
        return 1e12 if dtype == torch.float32 else 2e12


# What is pooled, how, and the kernels of forward and backward.
LAUNCHES: list[tuple[str, tuple[int, ...], bool, dict[str, Any], tuple[str, str]]] = [
    ("max_pool2d", (2, 3, 17, 19), False, {"kernel_size": 3, "stride": 2}, ("tile", "tile")),
    ("max_pool2d", (2, 24, 17, 19), True, {"kernel_size": 3, "stride": 2}, ("tile", "tile")),
    ("max_pool2d", (2, 3, 40, 9), False, {"kernel_size": 2, "stride": 5}, ("walk", "walk")),
    ("max_pool1d", (2, 3, 70), False, {"kernel_size": 7, "dilation": 3}, ("tile", "tile")),
    ("max_pool2d", (1, 40, 40, 41), True, {"kernel_size": 17, "stride": 3}, ("tile", "tile")),
    ("avg_pool3d", (1, 2, 6, 7, 9), False, {"kernel_size": 2}, ("tile", "tile")),
    ("avg_pool2d", (1, 130, 9, 9), True, {"kernel_size": 3}, ("tile", "tile")),
    ("adaptive_avg_pool2d", (2, 3, 40, 40), False, {"output_size": 1}, ("reduce", "tile")),
    ("adaptive_max_pool2d", (2, 40, 40, 40), True, {"output_size": 1}, ("reduce", "tile")),
    ("adaptive_max_pool2d", (2, 3, 13, 17), False, {"output_size": 5}, ("tile", "tile")),
]


@pytest.mark.parametrize(("name", "shape", "last", "window", "paths"), LAUNCHES)
def test_plans_are_what_runs(
    name: str, shape: tuple[int, ...], last: bool, window: dict, paths: tuple[str, str]
) -> None:
    x = torch.randn(shape)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    op = getattr(W, name)
    plans = weft.explain(op, x, **window, backward=True, target="cuda")
    with host_execution() as run:
        y = op(x, **window)
        torch.autograd.grad(y.sum(), x)
    assert [p.path for p in plans] == list(paths)
    assert [p.phase for p in plans] == ["forward", "backward"]
    for plan, launch in zip(plans, run.launches, strict=True):
        assert plan.kernel == launch.kernel
        assert (plan.blocks, plan.threads) == (launch.blocks, launch.threads)
        assert plan.shared_bytes == launch.shared_bytes
        if plan.path == "tile":  # what a plan expects bounds what is counted
            assert plan.least_bytes <= plan.bytes
            assert launch.traffic <= 1.1 * plan.bytes + 64 * plan.blocks


def test_problems_that_no_machine_holds() -> None:
    """Billions of elements: nothing is allocated, and offsets do not overflow."""
    x = torch.empty(1 << 22, 64, 112, 112, dtype=torch.bfloat16, device="meta")
    (plan,) = weft.explain(W.max_pool2d, x, 3, 2, 1, target="cuda")
    assert plan.least_bytes == x.numel() * 2 + x.numel() // 4 * 2
    assert plan.flops == x.numel() // 4 * 9
    assert 1 <= plan.bytes / plan.least_bytes <= 1.25
    long = torch.empty(1, 1, 3 << 30, device="meta")
    (plan,) = weft.explain(W.max_pool1d, long, 2, target="cuda")
    assert plan.path == "walk"


def test_shared_memory_stays_within_what_a_gpu_has() -> None:
    """96 KiB is what every one has; only high windows over channels-last maps take more."""
    for channels in (1, 3, 8, 20, 64, 1000):
        for extent in (1, 7, 56, 300):
            for kernel in (2, 3, 13, 31):
                if kernel > extent:
                    continue
                for layout in (torch.contiguous_format, torch.channels_last):
                    x = torch.empty(4, channels, extent, extent, device="meta")
                    x = x.contiguous(memory_format=layout).requires_grad_()
                    for op in (W.max_pool2d, W.avg_pool2d):
                        plans = weft.explain(
                            op, x, kernel, 1, kernel // 2, backward=True, target="cuda"
                        )
                        high = kernel >= 13 and layout == torch.channels_last
                        for plan in plans:
                            assert plan.shared_bytes <= (227 if high else 96) * 1024
                            assert plan.threads % 32 == 0
                            assert 0 < plan.threads <= 512
                            assert plan.blocks > 0


def test_modules_and_ceilings() -> None:
    model = torch.nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1))
    before = [p.grad for p in model.parameters()]
    plans = weft.explain(
        model, torch.randn(2, 3, 12, 12), backward=True, target="cuda", ceilings=Ceilings()
    )
    ops = [(p.op, p.phase) for p in plans]
    assert ops.index(("max_pool", "forward")) < ops.index(("max_pool_backward", "backward"))
    assert ("conv", "forward") in ops
    assert [p.grad for p in model.parameters()] == before
    pool = next(p for p in plans if p.op == "max_pool")
    assert pool.bound == "memory"
    assert pool.seconds == pytest.approx(pool.bytes / 1e9)
    conv = next(p for p in plans if p.op == "conv")
    assert conv.flops == 2 * 2 * 8 * 10 * 10 * 27
    assert conv.seconds == pytest.approx(max(conv.bytes / 1e9, conv.flops / 1e12))


def test_ops_without_plans_are_listed() -> None:
    regions = torch.zeros(1, 7, dtype=torch.int64)
    (launch,) = weft.explain(
        torch.ops.weft.region_avg_pool, torch.randn(1, 2, 8, 8), regions, [2, 2]
    )
    assert (launch.kernel, launch.flops, launch.bound, launch.seconds) == (None,) * 4
    assert launch.bytes > 0


def test_the_table() -> None:
    text = str(weft.explain(nn.MaxPool2d(3, 2, 1), torch.randn(2, 8, 30, 30), target="cuda"))
    for word in ("weft on cuda", "max_pool", "tile", "blocks", "KiB", "memory"):
        assert word in text
    assert "at best" not in text
    x = torch.randn(2, 8, 30, 30)
    assert "at best" in str(weft.explain(nn.MaxPool2d(3), x, ceilings=Ceilings()))


def test_the_target() -> None:
    x = torch.randn(2, 3, 8, 8)
    assert weft.explain(W.avg_pool2d, x, 2).target == _C.cpu_target()
    with host_execution() as run:
        plans = weft.explain(W.avg_pool2d, x, 2)
    assert plans.target == "cuda-on-host"
    assert run.launches == []  # nothing ran
    with pytest.raises(ValueError, match="expected target 'cuda'"):
        weft.explain(W.avg_pool2d, x, 2, target="tpu")


def test_errors_are_those_of_the_call() -> None:
    with pytest.raises(RuntimeError, match="stride"):
        weft.explain(W.max_pool2d, torch.randn(1, 1, 8, 8), 2, 0)
    W.max_pool2d(torch.randn(1, 1, 8, 8), 2)  # and no request stays open


# ---- convolution and recurrence ------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("channels", "groups", "outputs"), [(20, 1, 24), (6, 6, 6), (3, 1, 4), (3, 1, 32), (2, 1, 1)]
)
def test_convolution_takes_the_path_of_its_plan(
    channels: int, groups: int, outputs: int, last: bool
) -> None:
    """Of every instruction set, whether this machine has it or not."""
    x = torch.randn(2, channels, 6, 7)
    layer = nn.Conv2d(channels, outputs, 3, groups=groups)
    if last:
        x, layer = (
            x.contiguous(memory_format=torch.channels_last),
            layer.to(memory_format=torch.channels_last),
        )
    for target, lanes in (("avx512", 16), ("avx2", 8), ("baseline", 4)):
        plans = weft.explain(layer, x.requires_grad_(), backward=True, target=target)
        paths = {p.kernel: p.path for p in plans}
        if groups == channels == outputs:  # all gradients in one walk
            path = "pixels" if last else "rows"
            fprop = "short_rows" if path == "rows" and target == "avx512" else path
            assert paths == {"conv_fprop": fprop, "conv_backward": path}
            assert [p.flops for p in plans] == [2 * 2 * 6 * 4 * 5 * 9, 2 * 2 * 2 * 6 * 4 * 5 * 9]
            continue
        along = {"fprop": outputs, "dgrad": channels, "wgrad": max(channels, outputs)}
        for step, count in along.items():  # channels-last maps stay so where half a vector is full
            fills = 2 * count > lanes if last else count >= lanes
            products = 2 * 20 * outputs * channels * 9
            moved = 2 * (42 * channels + 20 * outputs)
            if (target, step, last) == ("avx512", "fprop", False) and products < 32 * moved:
                fills = False  # not worth turning the maps round
            path = "product" if fills else "planes"
            # Few input channels and many outputs; of wgrad, whose rows are short here, not.
            if target != "baseline" and not last and channels == 3 and outputs == 32:
                path = {"wgrad": path}.get(step, "columns")
            assert paths[f"conv_{step}"] == path
        for plan in plans:
            assert 0 < plan.least_bytes <= plan.bytes
            if plan.kernel != "conv_bias_grad":
                assert plan.flops == 2 * 2 * outputs * 4 * 5 * channels // groups * 9


@pytest.mark.parametrize(("target", "masks"), [("avx512", True), ("avx2", False)])
def test_depthwise_convolution_takes_the_path_of_its_plan(target: str, masks: bool) -> None:
    def paths(layer: nn.Module, *size: int) -> tuple[str, str]:
        x = torch.randn(size, dtype=next(layer.parameters()).dtype, requires_grad=True)
        fprop, backward = weft.explain(layer, x, backward=True, target=target)
        assert (fprop.kernel, backward.kernel) == ("conv_fprop", "conv_backward")
        return fprop.path, backward.path

    def depthwise(kernel: int, stride: int, double: bool = False) -> nn.Module:
        layer = nn.Conv2d(4, 4, kernel, stride, kernel // 2, groups=4)
        return layer.double() if double else layer

    pairs = ("pairs", "pairs") if masks else ("rows", "rows")
    short = ("short_rows", "rows") if masks else ("rows", "rows")
    assert paths(depthwise(3, 2), 2, 4, 30, 30) == pairs
    assert paths(depthwise(5, 2), 2, 4, 30, 30) == ("rows", "rows")
    assert paths(depthwise(5, 1), 2, 4, 30, 16) == short
    assert paths(depthwise(5, 1), 2, 4, 30, 17) == ("rows", "rows")
    assert paths(depthwise(5, 1, True), 2, 4, 30, 9) == ("rows", "rows")
    assert paths(depthwise(3, 1, True), 2, 4, 14, 8) == short
    assert paths(depthwise(3, 1), 2, 4, 15, 8) == ("rows", "rows")


def test_convolutions_that_no_machine_holds() -> None:
    layer = nn.Conv1d(1, 1, 5, padding=2, device="meta")
    x = torch.empty(1, 1, 3 << 30, device="meta")
    for target in ("avx512", "cuda"):
        (plan,) = weft.explain(layer, x, target=target)
        assert plan.flops == 2 * 5 * x.numel()
        assert plan.least_bytes == 4 * (2 * x.numel() + 5)
    assert plan.blocks * plan.threads >= x.numel()


CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)


@pytest.mark.parametrize("kind", CELLS)
def test_cells_launch_what_their_plan_says(kind: Any) -> None:
    cell, x = kind(5, 20), torch.randn(9, 5, requires_grad=True)
    plans = weft.explain(cell, x, backward=True, target="cuda")
    with host_execution() as run:
        torch.stack(tuple(cell(x)) if kind is nn.LSTMCell else (cell(x),)).sum().backward()
    planned = {p.kernel: p for p in plans}
    assert run.launches
    for launch in run.launches:
        plan = planned[launch.kernel]
        assert (plan.blocks, plan.threads, plan.shared_bytes) == (
            launch.blocks,
            launch.threads,
            launch.shared_bytes,
        )


LAYERS: list[tuple[Any, dict[str, Any]]] = [
    (nn.LSTM, {}),
    (nn.LSTM, {"proj_size": 3}),
    (nn.LSTM, {"layer_norm": True}),
    (nn.LSTM, {"coupled_gates": True, "bidirectional": True}),
    (nn.GRU, {"num_layers": 2}),
    (nn.GRU, {"reset_after": False}),
    (nn.GRU, {"reset_after": False, "layer_norm": True}),
    (nn.RNN, {"nonlinearity": "relu"}),
]


@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_layers_launch_as_often_as_their_plan_says(kind: Any, options: dict[str, Any]) -> None:
    layer, x = kind(4, 6, **options), torch.randn(3, 2, 4, requires_grad=True)
    plans = weft.explain(layer, x, backward=True, target="cuda")
    with host_execution() as run:
        layer(x)[0].sum().backward()
    ours = [p for p in plans if p.path != "torch's"]
    assert sum(p.launches for p in ours) == len(run.launches)
    assert {p.kernel for p in ours} <= {launch.kernel for launch in run.launches}
    assert all(p.flops and p.bytes >= p.least_bytes > 0 for p in plans)


def test_threads_of_a_layer_grow_with_its_step() -> None:
    def plan(batch: int, hidden: int, steps: int = 10) -> Any:
        x = torch.empty(steps, batch, hidden, device="meta")
        layer = nn.LSTM(hidden, hidden, device="meta")
        return next(p for p in weft.explain(layer, x, target="avx2") if p.kernel == "rnn_layer")

    assert plan(1, 64).threads == 1
    assert plan(1, 128, 100).threads == 3  # of one row too, if there are steps enough
    assert plan(1, 128, 4).threads == 1
    assert plan(32, 512).threads > plan(8, 512).threads > plan(2, 512).threads > 4
    assert plan(64, 32, 100).threads == 64 // 6  # short steps, small weights: threads share rows
    assert plan(1, 512).bound == "memory"  # one row: the weights are read again in each step
    assert plan(64, 512).bound == "arithmetic"
    assert plan(8, 64, 20).flops == 2 * plan(8, 64, 10).flops


def test_a_grid_is_explained() -> None:
    layer, x = nn.MDLSTM2d(3, 4), torch.randn(2, 3, 4, 5)
    plans = weft.explain(layer, x.requires_grad_(), backward=True, target="cuda")
    with host_execution() as run:
        layer(x).sum().backward()
    assert sum(p.launches for p in plans if p.kernel.startswith("grid")) == len(run.launches)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("channels", "groups", "outputs", "stride"), [(24, 1, 32, 2), (6, 6, 6, 1), (16, 2, 16, 1)]
)
def test_convolutions_launch_what_their_plan_says(
    channels: int, groups: int, outputs: int, stride: int, last: bool
) -> None:
    x = torch.randn(2, channels, 9, 8)
    layer = nn.Conv2d(channels, outputs, 3, stride, groups=groups)
    if last:
        layer, x = (t.to(memory_format=torch.channels_last) for t in (layer, x))
    plans = weft.explain(layer, x.requires_grad_(), backward=True, target="cuda")
    with host_execution() as run:
        layer(x).sum().backward()
    launched = iter(run.launches)
    for plan in plans:
        for _ in range(plan.launches):
            launch = next(launched)
            assert (plan.kernel, plan.threads) == (launch.kernel, launch.threads)
            if plan.launches == 1:
                assert plan.blocks == launch.blocks
    assert next(launched, None) is None
