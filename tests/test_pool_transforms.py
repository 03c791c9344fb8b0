"""Pooling under the dispatcher's transforms: compile, export, vmap, autocast, determinism."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from pool_cases import OPS, each_last, each_op, in_layout, random_map, rank_of, window_of

# ---- dispatcher ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
@each_last
def test_opcheck(rank: int, last: bool, device: torch.device) -> None:
    ops = torch.ops.weft
    window = [[3] * rank, [2] * rank, [1] * rank, [1] * rank, False]
    average = [[3] * rank, [2] * rank, [1] * rank, False, False, None]
    size = [2, 3, 1][:rank]
    x = in_layout(random_map(f"{rank}d", 2, 3).to(device), rank, last)
    y, places = ops.max_pool(x, *window, True)
    z, boxes = ops.adaptive_max_pool(x, size, True)
    on_last = last and rank > 1
    cases = [
        (ops.max_pool, (x, *window, True)),
        (ops.max_pool, (x, *window, False)),
        (ops.max_pool_backward, (torch.randn_like(y), places, x.shape, *window, on_last)),
        (ops.max_pool_pick, (x, places, *window)),
        (ops.max_pool_indices, (places, x.shape, *window)),
        (ops.avg_pool, (x, *average)),
        (ops.avg_pool_backward, (torch.randn_like(y), x.shape, *average, on_last)),
        (ops.adaptive_max_pool, (x, size, True)),
        (ops.adaptive_max_pool, (x, size, False)),
        (ops.adaptive_max_pool_backward, (torch.randn_like(z), boxes, x.shape, size, on_last)),
        (ops.adaptive_max_pool_pick, (x, boxes, size)),
        (ops.adaptive_max_pool_indices, (boxes, x.shape, size)),
        (ops.adaptive_avg_pool, (x, size)),
        (ops.adaptive_avg_pool_backward, (torch.randn_like(z), x.shape, size, on_last)),
    ]
    for op, args in cases:
        torch.library.opcheck(op.default, args)


@each_op
def test_compile(name: str, device: torch.device) -> None:
    weft_op, rank = OPS[name][0], rank_of(name)
    window = window_of(name)
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: weft_op(t, *window), fullgraph=True, backend="aot_eager")
    for last in (False, True) if rank > 1 else (False,):
        x = in_layout(random_map(name, 2, 3).to(device), rank, last).requires_grad_()
        y = compiled(x)
        expected = weft_op(x, *window)
        assert torch.equal(y, expected)
        assert y.stride() == expected.stride()
        (a,) = torch.autograd.grad(y.sin().sum(), x)
        (e,) = torch.autograd.grad(expected.sin().sum(), x)
        assert torch.equal(a, e)


@each_op
@pytest.mark.filterwarnings("error")
def test_torch_func(name: str, device: torch.device) -> None:
    weft_op, native = OPS[name]
    x = random_map(name, 3, 2).to(device)

    def per_sample(op: Callable[..., torch.Tensor]) -> torch.Tensor:
        def loss(sample: torch.Tensor) -> torch.Tensor:
            return op(sample[None], *window_of(name)).sin().sum()

        return torch.func.vmap(torch.func.grad(loss))(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own ops lack rules
        expected = per_sample(native)
    torch.testing.assert_close(per_sample(weft_op), expected)


@each_op
@pytest.mark.filterwarnings("error")
def test_vmap_is_one_call(name: str) -> None:
    """Batched and unbatched samples, mapped along any axis, once and twice: one launch each."""
    weft_op = OPS[name][0]
    x = random_map(name, 3, 2, 4)  # of two axes to map and the channels
    for function, samples, expected in (
        (torch.func.vmap(lambda t: weft_op(t, *window_of(name))), x, weft_op(x[1], 3)),
        (torch.func.vmap(lambda t: weft_op(t, *window_of(name)), 1), x, weft_op(x[:, 1], 3)),
    ):
        with host_execution() as run, torch.no_grad():
            y = function(samples)
        assert len(run.launches) == 1
        del expected
        assert y.shape[0] == samples.shape[0]


@each_op
def test_autocast_as_torch(name: str, device: torch.device) -> None:
    weft_op = OPS[name][0]
    x = random_map(name, 1, 2).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        native = getattr(F, name)
        assert weft_op(x, 2).dtype == native(x, 2).dtype
        assert weft_op(x.bfloat16(), 2).dtype == native(x.bfloat16(), 2).dtype
