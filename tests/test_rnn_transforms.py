"""Recurrent cells and layers under `torch.func.vmap`, batched gradients and `torch.export`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import weft
from rnn_cases import CELLS, layer, masks, problem
from weft.mdlstm import mdlstm2d
from weft.testing import host_execution

SIZE = (3, 2, 3, 5)
SAMPLES = 3

# ---- vmap ----------------------------------------------------------------------------------------


def one_by_one(function: Callable[..., Any], samples: list[tuple[Tensor, ...]]) -> Any:
    found = [function(*sample) for sample in samples]
    if isinstance(found[0], Tensor):
        return torch.stack(found)
    return tuple(map(torch.stack, zip(*found, strict=True)))


def check_vmap(
    function: Callable[..., Any], in_dims: tuple[int | None, ...], *args: Tensor
) -> None:
    """As many calls; without a warning that torch falls back to them."""
    samples = [
        tuple(t if dim is None else t.select(dim, i) for t, dim in zip(args, in_dims, strict=True))
        for i in range(SAMPLES)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = torch.func.vmap(function, in_dims)(*args)
    torch.testing.assert_close(found, one_by_one(function, samples))


def several(tensor: Tensor) -> Tensor:
    return torch.randn(SAMPLES, *tensor.shape, dtype=tensor.dtype, device=tensor.device)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", ["plain", "all"])
def test_layers_are_mapped(cell: str, kind: str, device: torch.device) -> None:
    given = {n: t.detach() for n, t in problem(cell, SIZE, device=device).items()}
    run = layer(cell, masks(cell, kind, SIZE, torch.float64, device))
    x, weight = several(given["x"]), several(given["w_hh"])

    def energy(x: Tensor, w: Tensor) -> Tensor:
        return run(**given | {"x": x, "w_hh": w})[0].square().sum()

    def outputs(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return run(**given | {"x": x, "w_hh": w})

    check_vmap(outputs, (0, None), x, given["w_hh"])
    check_vmap(outputs, (2, None), x.movedim(0, 2), given["w_hh"])
    check_vmap(outputs, (None, 0), given["x"], weight)
    check_vmap(torch.func.grad(energy, 0), (0, None), x, given["w_hh"])
    check_vmap(torch.func.grad(energy, (0, 1)), (0, None), x, given["w_hh"])
    check_vmap(torch.func.grad(energy, (0, 1)), (0, 0), x, weight)


@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives_are_mapped(cell: str, device: torch.device) -> None:
    given = {n: t.detach() for n, t in problem(cell, SIZE, device=device).items()}
    run, x = layer(cell, {}), several(given["x"])

    def slope(x: Tensor, w: Tensor) -> Tensor:
        def energy(x: Tensor) -> Tensor:
            return run(**given | {"x": x, "w_hh": w})[0].square().sum()

        return torch.func.grad(energy)(x).square().sum()

    check_vmap(torch.func.grad(slope, 0), (0, None), x, given["w_hh"])
    check_vmap(torch.func.grad(slope, 1), (0, None), x, given["w_hh"])


def test_mapped_samples_are_one_batch() -> None:
    def launches(function: Callable[[], Any]) -> int:
        with host_execution() as host:
            function()
            return len(host.launches)

    given = {n: t.detach() for n, t in problem("gru", SIZE).items()}
    run, x = layer("gru", {}), several(given["x"])

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: run(**given | {"x": x})[0].square().sum())(x)

    assert launches(lambda: torch.func.vmap(gradient)(x)) == launches(lambda: gradient(x[0]))


def test_grids_are_mapped(device: torch.device) -> None:
    sizes = [(2, 3, 2, 3), (20, 3), (20, 4), (20, 4), (20,)]
    x, *weights = (torch.randn(s, dtype=torch.float64, device=device) for s in sizes)

    def energy(x: Tensor, w: Tensor) -> Tensor:
        return mdlstm2d(x, weights[0], w, *weights[2:]).square().sum()

    def slope(x: Tensor, w: Tensor) -> Tensor:
        return torch.func.grad(energy)(x, w).square().sum()

    for function in (energy, torch.func.grad(energy, (0, 1)), torch.func.grad(slope, (0, 1))):
        check_vmap(function, (0, None), several(x), weights[1])
        check_vmap(function, (0, 0), several(x), several(weights[1]))


# ---- batched gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell", "LSTM", "GRU", "RNN"])
def test_gradients_of_many_outputs_at_once(name: str, device: torch.device) -> None:
    module = getattr(weft.nn, name)(3, 4, dtype=torch.float64, device=device)
    rows = (2, 3) if name.endswith("Cell") else (5, 2, 3)
    x = torch.randn(rows, dtype=torch.float64, device=device, requires_grad=True)
    output = module(x)
    while isinstance(output, tuple):
        output = output[0]
    inputs = [x, *module.parameters()]
    several_of = torch.randn(SAMPLES, *output.shape, dtype=torch.float64, device=device)

    def gradients(of: Tensor, batched: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, inputs, of, retain_graph=True, is_grads_batched=batched)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gradients(several_of, True)
    expected = [gradients(of, False) for of in several_of]
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*expected, strict=True))))


# ---- compiler ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_compile_of_modules(name: str) -> None:
    module = getattr(weft.nn, name)(3, 4, 2, bidirectional=True)
    torch._dynamo.reset()
    # Dynamo refuses subclasses of torch's layers unless told not to: those it would unroll.
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        x = torch.randn(5, 2, 3, requires_grad=True)
        found, expected = (m(x)[0] for m in (compiled, module))
        torch.testing.assert_close(found, expected)
        gradients = (torch.autograd.grad(o.square().sum(), x)[0] for o in (found, expected))
        torch.testing.assert_close(*gradients)


# ---- export --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LSTM", {"peephole": "standard", "layer_norm": True}),
        ("LSTM", {"peephole": "previous", "bidirectional": True}),
        ("LSTM", {"coupled_gates": True, "proj_size": 3}),
        ("GRU", {"reset_after": False, "num_layers": 2}),
        ("RNN", {"recurrent_dropout": 0.5, "zoneout": 0.5}),
    ],
)
def test_export(name: str, options: dict[str, Any]) -> None:
    module = getattr(weft.nn, name)(3, 4, **options).eval()
    x, lengths = torch.randn(5, 2, 3), torch.tensor([5, 3])
    steps = torch.export.Dim("steps", min=2, max=50)
    program = torch.export.export(
        module, (x,), {"lengths": lengths}, dynamic_shapes={"input": {0: steps}, "lengths": None}
    )
    longer = torch.randn(9, 2, 3)
    for given in (x, longer):
        torch.testing.assert_close(
            program.module()(given, lengths=lengths), module(given, lengths=lengths)
        )


@pytest.mark.parametrize("directions", [1, 4])
def test_export_of_grids(directions: int) -> None:
    module = weft.nn.MDLSTM2d(3, 4, directions)
    x = torch.randn(2, 3, 4, 5)
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), module(x))
