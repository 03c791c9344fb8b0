"""Pooling under the dispatcher's transforms: compile, export, vmap, autocast, determinism."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from pool_cases import OPS, each_last, each_op, in_layout, random_map, rank_of, window_of
from weft.testing import host_execution

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
    """Of batched and unbatched samples, along any axis, and of vmap inside vmap."""
    x = random_map(name, 3, 2, 4)  # two axes to map or batch, then channels

    def op(sample: torch.Tensor) -> torch.Tensor:
        return OPS[name][0](sample, *window_of(name))

    with host_execution() as run, torch.no_grad():
        op(x.flatten(0, 1))
    one_call = len(run.launches)
    vmap = torch.func.vmap
    for function, in_turn in (
        (vmap(op), torch.stack([op(s) for s in x])),
        (vmap(op, 1), torch.stack([op(s) for s in x.unbind(1)])),
        (vmap(vmap(op)), torch.stack([torch.stack([op(t) for t in s]) for s in x])),
    ):
        with host_execution() as run, torch.no_grad():
            y = function(x)
        assert len(run.launches) == one_call
        torch.testing.assert_close(y, in_turn)


@each_op
@pytest.mark.filterwarnings("error")
def test_jacobians(name: str, device: torch.device) -> None:
    weft_op, native = OPS[name]
    x = random_map(name, 1, 2, extents=(3, 4, 5)).to(device).double()
    window = (2,)
    expected = torch.autograd.functional.jacobian(lambda t: native(t, *window), x)
    for jacobian in (torch.func.jacrev, lambda f: torch.func.vmap(torch.func.jacrev(f))):
        samples = x if jacobian is torch.func.jacrev else x[None]
        found = jacobian(lambda t: weft_op(t, *window))(samples)
        torch.testing.assert_close(found.reshape(expected.shape), expected)

    def loss(t: torch.Tensor) -> torch.Tensor:
        return weft_op(t, *window).sin().sum()

    second = torch.func.jacrev(torch.func.grad(loss))(x)
    hessian = torch.autograd.functional.hessian(lambda t: native(t, *window).sin().sum(), x)
    torch.testing.assert_close(second, hessian)


@pytest.mark.parametrize("kind", [n[:-2] for n in OPS if n.endswith("1d") and "max" in n])
@pytest.mark.filterwarnings("error")
def test_indices_under_vmap(kind: str) -> None:
    name = f"{kind}2d"
    x = random_map(name, 3, 2)
    mapped = torch.func.vmap(lambda t: OPS[name][0](t, 2, return_indices=True))(x)
    in_turn = OPS[name][0](x, 2, return_indices=True)
    assert all(torch.equal(a, e) for a, e in zip(mapped, in_turn, strict=True))


@each_op
def test_export(name: str, device: torch.device) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return OPS[name][0](x, *window_of(name))

    batch = torch.export.Dim("batch", min=2)
    x = random_map(name, 3, 2).to(device)
    exported = torch.export.export(Layer(), (x,), dynamic_shapes=({0: batch},)).module()
    for samples in (x, torch.cat([x, x])):
        assert torch.equal(exported(samples), Layer()(samples))


@each_op
def test_deterministic_algorithms(name: str, device: torch.device) -> None:
    """torch raises here for most backwards on a GPU."""
    x = random_map(name, 2, 2).to(device).requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        y = OPS[name][0](x, *window_of(name))
        (grad,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        torch.autograd.grad(grad.sum(), x)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(y, OPS[name][1](x, *window_of(name)))


@each_op
def test_autocast_as_torch(name: str, device: torch.device) -> None:
    weft_op = OPS[name][0]
    x = random_map(name, 1, 2).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        native = getattr(F, name)
        assert weft_op(x, 2).dtype == native(x, 2).dtype
        assert weft_op(x.bfloat16(), 2).dtype == native(x.bfloat16(), 2).dtype
