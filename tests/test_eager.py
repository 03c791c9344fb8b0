"""The eager path does what the autograd Function does, and declines what is not its business."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import weft.functional as W
from harness import Seen
from weft import _C, rnn

CELLS = {"lstm": (_C.lstm_cell, rnn.LSTMCell, 4), "gru": (_C.gru_cell, rnn.GRUCell, 3)}
CELLS["tanh"] = CELLS["relu"] = (_C.rnn_cell, rnn.RNNCell, 1)


def arguments(cell: str, grad: bool = True) -> list[Any]:
    """input, states, weights, biases and options of a cell with B 2, I 3, H 5."""
    rows = CELLS[cell][2] * 5
    states = 2 if cell == "lstm" else 1
    sizes = [(2, 3), *states * [(2, 5)], (rows, 3), (rows, 5), (rows,), (rows,)]
    tensors = [torch.randn(size).requires_grad_(grad) for size in sizes]
    return [*tensors, *([cell == "relu"] if cell in ("tanh", "relu") else [])]


def eagerly(cell: str, args: list[Any]) -> tuple[Tensor, ...] | None:
    found = CELLS[cell][0](*args)
    return (found,) if isinstance(found, Tensor) else found


def by_function(cell: str, args: list[Any]) -> tuple[Tensor, ...]:
    found = CELLS[cell][1].apply(*args)
    visible = 2 if cell == "lstm" else 1
    return (found,) if isinstance(found, Tensor) else found[:visible]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("missing", [None, "input", "biases", "first bias", "weights"])
def test_same_bits_as_the_function(cell: str, missing: str | None) -> None:
    args = arguments(cell)
    tensors = [t for t in args if isinstance(t, Tensor)]
    if missing == "biases":
        at = len(tensors) - 2
        args[at : at + 2] = [None, None]
        tensors = tensors[:at]
    elif missing is not None:
        dropped = {"input": tensors[:1], "first bias": tensors[-2:-1], "weights": tensors[-4:-2]}
        for tensor in dropped[missing]:
            tensor.requires_grad_(False)
    wanted = [t for t in tensors if t.requires_grad]
    results = []
    for run in (eagerly, by_function):
        outputs = run(cell, args)
        assert outputs is not None
        seeds = [torch.ones_like(t) for t in outputs]
        first = torch.autograd.grad(outputs, wanted, seeds, retain_graph=True)
        linked = torch.autograd.grad(outputs, wanted, seeds, create_graph=True)
        # relu is linear on both sides: without gradients of weights there is no second derivative.
        norm = sum((g * g).sum() for g in linked if g.requires_grad)
        second = torch.autograd.grad(norm, wanted, allow_unused=True) if norm else ()
        results.append([*outputs, *first, *linked, *(t for t in second if t is not None)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("cell", CELLS)
def test_a_second_backward_is_torchs_error(cell: str) -> None:
    args = arguments(cell)
    outputs = eagerly(cell, args)
    assert outputs is not None
    assert outputs[0].grad_fn.name() == f"{CELLS[cell][1].__name__}Backward"
    outputs[0].sum().backward()
    assert all(t.grad is not None for t in args if isinstance(t, Tensor))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        outputs[0].sum().backward()


@pytest.mark.parametrize("cell", CELLS)
def test_changes_in_place_are_noticed(cell: str) -> None:
    args = arguments(cell)
    outputs = eagerly(cell, args)
    assert outputs is not None
    with torch.no_grad():
        args[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs[0].sum().backward()


@pytest.mark.parametrize("cell", CELLS)
def test_hooks_of_saved_tensors_are_called(cell: str) -> None:
    args = arguments(cell)
    packed, unpacked = [], []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(t) or t.clone(), lambda t: unpacked.append(t) or t
    ):
        outputs = eagerly(cell, args)
    assert outputs is not None
    outputs[0].sum().backward()
    assert len(packed) == len(unpacked) >= 5


def test_without_grad_nothing_is_kept() -> None:
    args = arguments("lstm")
    with torch.no_grad():
        found = _C.lstm_cell(*args)
    assert not any(t.requires_grad for t in found)
    assert not any(t.requires_grad for t in _C.lstm_cell(*arguments("lstm", grad=False)))
    with torch.inference_mode():
        assert _C.lstm_cell(*args)[0].is_inference()


@pytest.mark.parametrize("cell", CELLS)
def test_modes_see_ops_forward_and_backward(cell: str) -> None:
    args = arguments(cell)
    family = {"tanh": "rnn", "relu": "rnn"}.get(cell, cell)
    with Seen() as forward:
        assert eagerly(cell, args) is None
    assert not forward.ops
    function = getattr(W, f"{family}_cell")
    call = [args[0], tuple(args[1:3]), *args[3:]] if cell == "lstm" else args[:6]
    with Seen() as forward:
        function(*call)
    assert f"weft.{family}_cell.default" in forward.ops
    outputs = eagerly(cell, args)
    assert outputs is not None
    with Seen() as backward:
        outputs[0].sum().backward()
    assert f"weft.{family}_cell_gradients.default" in backward.ops


def test_declines_what_is_not_plain() -> None:
    args = arguments("gru")
    assert _C.gru_cell(*args) is not None
    assert _C.gru_cell(*args[:-1]) is None
    assert _C.gru_cell(3.0, *args[1:]) is None
    assert _C.gru_cell(args[0].to("meta"), *args[1:]) is None
    assert _C.gru_cell(args[0].to_sparse(), *args[1:]) is None
    with torch.autocast("cpu"):
        assert _C.gru_cell(*args) is None
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(args[0].detach(), torch.ones(2, 3))
        assert _C.gru_cell(dual, *args[1:]) is None
    assert torch.func.vmap(
        lambda x: torch.tensor(_C.gru_cell(x, *args[1:]) is None) & x.isfinite()
    )(torch.randn(2, 2, 3)).all()

    class Mine(Tensor):
        pass

    assert _C.gru_cell(args[0].detach().as_subclass(Mine), *args[1:]) is None


def test_errors_are_those_of_the_op() -> None:
    args = arguments("gru")
    with pytest.raises(RuntimeError, match="input has inconsistent input_size: got 4"):
        _C.gru_cell(torch.randn(2, 4), *args[1:])
    with pytest.raises(NotImplementedError, match="not implemented for 'Long'"):
        _C.gru_cell(torch.ones(2, 3, dtype=torch.long), *args[1:])
