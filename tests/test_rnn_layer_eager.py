"""The eager path of recurrent layers: what it takes, what it declines, and its derivatives."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import weft
import weft.rnn_layer
from harness import Seen
from rnn_cases import CELLS, SIZE, layer, masks, problem
from weft import _C

KINDS = ("plain", "reverse lengths", "all")


def eager_arguments(**changes: Any) -> list[Any]:
    """Those of `_C.rnn_layer` for a plain GRU."""
    given = problem("gru", dtype=torch.float32) | changes
    tensors = [given.get(n) for n in ("x", "h", "c", "w_ih", "w_hh", "b_ih", "b_hh")]
    return [*tensors, *(None,) * 9, 0.0, "gru", False, False]


def derivatives(run: Any, arguments: dict[str, Tensor], wanted: list[Tensor]) -> list[Tensor]:
    """Outputs, gradients with and without a graph of their own, and the second derivatives."""
    outputs = run(**arguments)
    seeds = [torch.linspace(-1, 1, t.numel()).reshape(t.shape) for t in outputs]
    first = torch.autograd.grad(outputs, wanted, seeds, retain_graph=True)
    linked = torch.autograd.grad(outputs, wanted, seeds, create_graph=True)
    energy = torch.stack([g.square().sum() for g in linked]).sum()
    second = torch.autograd.grad(energy, wanted, allow_unused=True)
    return [*outputs, *first, *linked, *(t for t in second if t is not None)]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
def test_same_bits_as_the_function(
    cell: str, kind: str, recompute: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = masks(cell, kind, SIZE, torch.float32, device) | {"recompute": recompute}
    arguments = problem(cell, SIZE, torch.float32, device)
    run, wanted = layer(cell, options), list(arguments.values())
    taken: list[bool] = []

    def watched(function: Any, *args: Any) -> Any:
        found = function(*args)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(weft.rnn_layer, "eagerly", watched)
    eager = derivatives(run, arguments, wanted)
    assert taken == [True]
    monkeypatch.setattr(weft.rnn_layer, "eagerly", lambda *_: None)
    torch.testing.assert_close(eager, derivatives(run, arguments, wanted), rtol=0, atol=0)


@pytest.mark.parametrize("constant", ["x", "h", "w_ih", "w_hh", "b_ih", "b_hh"])
def test_a_constant_gets_no_gradient(constant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem("lstm", dtype=torch.float32)
    arguments[constant].requires_grad_(False)
    wanted = [t for t in arguments.values() if t.requires_grad]
    eager = derivatives(layer("lstm", {}), arguments, wanted)
    monkeypatch.setattr(weft.rnn_layer, "eagerly", lambda *_: None)
    expected = derivatives(layer("lstm", {}), arguments, wanted)
    torch.testing.assert_close(eager, expected, rtol=0, atol=0)


@pytest.mark.parametrize("used", [0, 1, 2])
def test_each_output_alone(used: int) -> None:
    arguments = problem("lstm", dtype=torch.float32)
    outputs = layer("lstm", {})(**arguments)
    seeds = [
        torch.ones_like(t) if i == used else torch.zeros_like(t) for i, t in enumerate(outputs)
    ]
    wanted = list(arguments.values())
    expected = torch.autograd.grad(outputs, wanted, seeds, retain_graph=True)
    found = torch.autograd.grad(outputs[used].sum(), wanted)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_second_backward_is_torchs_error() -> None:
    output, _, _ = _C.rnn_layer(*eager_arguments())
    assert output.grad_fn.name() == "RNNLayerBackward"
    output.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.sum().backward()


@pytest.mark.parametrize("changed", ["x", "w_hh", "output"])
def test_changes_in_place_are_noticed(changed: str) -> None:
    arguments = problem("gru", dtype=torch.float32)
    output, _, _ = _C.rnn_layer(*eager_arguments(**arguments))
    with torch.no_grad():
        (output if changed == "output" else arguments[changed]).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_hooks_of_saved_tensors_are_called() -> None:
    packed, unpacked = [], []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(t) or t.clone(), lambda t: unpacked.append(t) or t
    ):
        output, _, _ = _C.rnn_layer(*eager_arguments())
    output.sum().backward()
    assert len(packed) == len(unpacked) >= 7


def test_nothing_outlives_the_results() -> None:
    arguments = eager_arguments()
    outputs = _C.rnn_layer(*arguments)
    outputs[0].sum().backward()
    alive = weakref.ref(arguments[0])
    del arguments, outputs
    assert alive() is None


def test_without_grad_nothing_is_kept() -> None:
    with torch.no_grad():
        assert not any(t.requires_grad for t in _C.rnn_layer(*eager_arguments()))
    with torch.inference_mode():
        assert _C.rnn_layer(*eager_arguments())[0].is_inference()


def test_modes_see_ops_forward_and_backward() -> None:
    x = torch.randn(4, 2, 3)
    module = weft.nn.GRU(3, 8)
    with Seen() as forward:
        module(x)
    assert "weft.rnn_layer.default" in forward.ops
    output, _ = module(x)
    with Seen() as backward:
        output.sum().backward()
    assert "weft.rnn_layer_gradients.default" in backward.ops


def test_declines_what_is_not_plain() -> None:
    args = eager_arguments()
    assert _C.rnn_layer(*args) is not None
    assert _C.rnn_layer(*args[:-1]) is None
    assert _C.rnn_layer(3.0, *args[1:]) is None
    assert _C.rnn_layer(*args[:-1], 1) is None
    assert _C.rnn_layer(*args[:-3], b"gru", *args[-2:]) is None
    assert _C.rnn_layer(args[0].to("meta"), *args[1:]) is None
    with torch.autocast("cpu"):
        assert _C.rnn_layer(*args) is None
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(args[0].detach(), torch.ones_like(args[0]))
        assert _C.rnn_layer(dual, *args[1:]) is None


def test_errors_are_those_of_the_op() -> None:
    args = eager_arguments()
    with pytest.raises(RuntimeError, match="weight_ih must be"):
        _C.rnn_layer(torch.randn(5, 4, 4), *args[1:])
    with pytest.raises(ValueError, match="cell must be 'lstm'"):
        _C.rnn_layer(*args[:-3], "gruu", *args[-2:])
    with pytest.raises(TypeError, match="must be Tensors, not None"):
        _C.rnn_layer(None, *args[1:])
