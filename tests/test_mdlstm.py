"""The 2-d LSTM against plain steps over the grid in torch's own operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import weft
import weft.testing
from harness import DTYPES, check_against_native, check_deterministic, sliced
from weft import _C
from weft.functional import mdlstm2d
from weft.reference import mdlstm2d as native

# Height, width, batch, inputs, hidden.
SIZES = [(3, 4, 2, 3, 5), (5, 2, 1, 2, 19), (1, 4, 3, 2, 6), (4, 1, 2, 3, 6), (2, 3, 50, 3, 4)]


def problem(
    size: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    height, width, batch, inputs, hidden = size
    rows = 5 * hidden
    sizes = {
        "x": (height, width, batch, inputs),
        "w_ih": (rows, inputs),
        "w_above": (rows, hidden),
        "w_left": (rows, hidden),
        "bias": (rows,),
    }
    return {
        name: (torch.randn(s, dtype=dtype, device=device) * (1 if name == "x" else hidden**-0.5))
        .detach()
        .requires_grad_()
        for name, s in sizes.items()
    }


def run(
    x: Tensor, w_ih: Tensor, w_above: Tensor, w_left: Tensor, bias: Tensor | None = None
) -> Tensor:
    return mdlstm2d(x, w_ih, w_above, w_left, bias)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_plain_steps(size: tuple[int, ...], device: torch.device) -> None:
    check_against_native(run, native, **problem(size, torch.float32, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype, device: torch.device) -> None:
    check_against_native(run, native, **problem((3, 4, 2, 3, 19), dtype, device))


@pytest.mark.parametrize("target", _C.available_cpu_targets())
def test_every_cpu_target(target: str) -> None:
    with weft.testing.cpu_target(target):
        for dtype in DTYPES:
            check_against_native(run, native, **problem((2, 3, 4, 5, 67), dtype))


def test_bits_do_not_depend_on_threads() -> None:
    arguments = problem((6, 5, 20, 30, 130), torch.float32)

    def all_of_it() -> list[Tensor]:
        inputs = list(arguments.values())
        output = run(**arguments)
        gradients = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)
        return [output, *gradients, *second]

    check_deterministic(all_of_it)


def test_gradcheck(device: torch.device) -> None:
    values = tuple(problem((2, 3, 2, 2, 2), device=device).values())
    assert torch.autograd.gradcheck(run, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, values, fast_mode=True)
    assert torch.autograd.gradcheck(run, values[:-1], fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_double_backward_matches_plain_steps(dtype: torch.dtype, device: torch.device) -> None:
    def penalty(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        def twice(**arguments: Tensor) -> tuple[Tensor, ...]:
            inputs = list(arguments.values())
            energy = function(**arguments).square().sum()
            gradients = torch.autograd.grad(energy, inputs, create_graph=True)
            return torch.autograd.grad(sum((g * g).sum() for g in gradients), inputs)

        return twice

    check_against_native(penalty(run), penalty(native), **problem((3, 2, 2, 3, 9), dtype, device))


def test_double_backward_of_one_gradient(device: torch.device) -> None:
    """Each gradient alone, so that all other directions are absent."""
    arguments = problem((2, 3, 2, 2, 3), device=device)
    inputs = list(arguments.values())
    found: list[Any] = []
    for function in (run, native):
        gradients = torch.autograd.grad(
            function(**arguments).square().sum(), inputs, create_graph=True
        )
        found.append(
            [torch.autograd.grad(g.square().sum(), inputs, retain_graph=True) for g in gradients]
        )
    torch.testing.assert_close(*found)


def test_opcheck(device: torch.device) -> None:
    tensors = [t.detach() for t in problem((2, 3, 2, 4, 5), device=device).values()]
    ops, kinds = torch.ops.weft, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.mdlstm, tensors, test_utils=kinds)
    kept = ops.mdlstm(*tensors)
    first = (kept[0], *tensors[:-1], *kept, [True] * 5)
    torch.library.opcheck(ops.mdlstm_gradients, first, test_utils=kinds)
    second = (*tensors, kept[0], *tensors, [True] * 6)
    torch.library.opcheck(ops.mdlstm_double_backward, second, test_utils=kinds)


def test_compile(device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    check_against_native(compiled, native, **problem((2, 3, 2, 4, 5), torch.float32, device))


@pytest.mark.parametrize("size", [(0, 2, 1, 2, 3), (2, 0, 1, 2, 3), (2, 2, 0, 2, 3)], ids=str)
def test_empty(size: tuple[int, ...], device: torch.device) -> None:
    arguments = problem(size, device=device)
    inputs = list(arguments.values())
    gradients = torch.autograd.grad(run(**arguments).square().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)
    assert all((g == 0).all() for g in (*gradients, *second))


def test_non_contiguous_inputs(device: torch.device) -> None:
    arguments = {n: sliced(t) for n, t in problem((3, 4, 2, 3, 5), device=device).items()}
    check_against_native(run, native, **arguments)


def test_func_grad_and_vmap(device: torch.device) -> None:
    given = {n: t.detach() for n, t in problem((2, 3, 2, 2, 3), device=device).items()}

    def gradient(function: Callable[..., Tensor], x: Tensor) -> Tensor:
        def loss(w: Tensor) -> Tensor:
            return function(**given | {"x": x, "w_left": w}).square().sum()

        return torch.func.grad(loss)(given["w_left"])

    inputs = torch.randn(2, *given["x"].shape, dtype=torch.float64, device=device)
    found = torch.func.vmap(lambda x: gradient(run, x))(inputs)
    torch.testing.assert_close(found, torch.stack([gradient(native, x) for x in inputs]))


@pytest.mark.parametrize("directions", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_module(directions: int, bias: bool, device: torch.device) -> None:
    module = weft.nn.MDLSTM2d(3, 5, directions, bias, device=device, dtype=torch.float64)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, device=device, requires_grad=True)
    output = module(x)
    assert output.shape == (2, 5 * directions, 4, 6)
    assert len(module.state_dict()) == directions * (4 if bias else 3)
    torch.testing.assert_close(module(x[0]), output[0])
    expected = []
    for direction, axes in enumerate([(), (3,), (2,), (2, 3)][:directions]):
        names = ("weight_ih", "weight_above", "weight_left")
        weights = [getattr(module, f"{name}_d{direction}") for name in names]
        shift = getattr(module, f"bias_d{direction}") if bias else x.new_zeros(25)
        h = native(x.flip(axes).permute(2, 3, 0, 1), *weights, shift)
        expected.append(h.permute(2, 3, 0, 1).flip(axes))
    torch.testing.assert_close(output, torch.cat(expected, 1))
    gradients = torch.autograd.grad(output.square().sum(), [x, *module.parameters()])
    assert all(g.isfinite().all() and (g != 0).any() for g in gradients)
    with torch.autocast(device.type, torch.bfloat16):
        assert module.float()(x.detach().float()).dtype == torch.bfloat16


def test_errors(device: torch.device) -> None:
    module = weft.nn.MDLSTM2d(3, 5, device=device)
    arguments = problem((2, 3, 2, 4, 5), torch.float32, device)
    x = torch.zeros(1, 4, 2, 2, device=device)
    short = arguments | {"w_left": arguments["w_left"][:4]}
    double = arguments | {"w_ih": arguments["w_ih"].double()}
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, "directions must be 1 or 4, got 2", lambda: weft.nn.MDLSTM2d(3, 5, 2)),
        (ValueError, "hidden_size must be at least 1", lambda: weft.nn.MDLSTM2d(3, 0)),
        (RuntimeError, r"got \[1, 4, 2, 2\]", lambda: module(x)),
        (RuntimeError, r"weight_left must be \[25, 5\]", lambda: run(**short)),
        (RuntimeError, "weight_ih", lambda: run(**double)),
        (RuntimeError, "height, width", lambda: run(**arguments | {"x": x[0]})),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
