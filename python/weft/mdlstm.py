"""The 2-d LSTM over a grid: autograd Functions and the functional form.

One direction of the whole grid is one op, its backward another, and the backward of that a third,
which runs the same kernels on dual numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.autograd import Function, autocast_arguments, needs_grad
from weft.batching import register_rows_rule

_ops = torch.ops.weft
_mdlstm = _ops.mdlstm.default
_mdlstm_gradients = _ops.mdlstm_gradients.default
_mdlstm_double_backward = _ops.mdlstm_double_backward.default

_GATES, _TENSORS = 5, 5


# ---- fake implementations ------------------------------------------------------------------------


@torch.library.register_fake("weft::mdlstm")
def _(
    input: Tensor, w_ih: Tensor, w_above: Tensor, w_left: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    grid, hidden = input.shape[:3], w_above.shape[1]
    return (
        input.new_empty((*grid, hidden)),
        input.new_empty((*grid, hidden)),
        input.new_empty((*grid, _GATES * hidden)),
    )


def _wanted(like: Tensor, sizes: list[Any], wanted: list[bool]) -> tuple[Tensor, ...]:
    pairs = zip(sizes, wanted, strict=True)
    return tuple(like.new_empty(size if asked else (0,)) for size, asked in pairs)


def _sizes(input: Tensor, w_ih: Tensor, w_above: Tensor, w_left: Tensor) -> list[Any]:
    return [input.shape, w_ih.shape, w_above.shape, w_left.shape, w_ih.shape[:1]]


@torch.library.register_fake("weft::mdlstm_gradients")
def _(*args: Any) -> tuple[Tensor, ...]:
    return _wanted(args[1], _sizes(*args[1:5]), args[-1])


@torch.library.register_fake("weft::mdlstm_double_backward")
def _(*args: Any) -> tuple[Tensor, ...]:
    return _wanted(args[6], [args[5].shape, *_sizes(*args[6:10])], args[-1])


# ---- vmap ----------------------------------------------------------------------------------------

_ROWS = (2, *(None,) * (_TENSORS - 1))  # of the arguments, the axis of rows

register_rows_rule("weft::mdlstm", _ROWS, (2, 2, 2))
register_rows_rule("weft::mdlstm_gradients", (2, *_ROWS[:-1], 2, 2, 2), _ROWS, wanted=True)
register_rows_rule("weft::mdlstm_double_backward", (*_ROWS, 2, *_ROWS), (2, *_ROWS), wanted=True)


# ---- autograd ------------------------------------------------------------------------------------


class MDLSTM(Function):
    """(output, kept cells, kept gates) of (input, w_ih, w_above, w_left, bias)."""

    @staticmethod
    def compute(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _mdlstm(*args)

    @staticmethod
    def save(ctx: Any, args: tuple, outputs: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.save_for_backward(*args, *outputs)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * _TENSORS
        wanted = list(ctx.needs_input_grad)
        call = MDLSTMGradients.apply if torch.is_grad_enabled() else MDLSTMGradients.compute
        found = iter(call(grad_output, *ctx.saved_tensors, wanted))
        return tuple(next(found) if asked else None for asked in wanted)


class MDLSTMGradients(Function):
    """Those gradients that are wanted."""

    @staticmethod
    def compute(*args: Any) -> tuple[Tensor, ...]:
        grad_output, *tensors, wanted = args
        arguments, kept = tensors[: _TENSORS - 1], tensors[_TENSORS:]  # the bias is not needed
        found = _mdlstm_gradients(grad_output, *arguments, *kept, wanted)
        return tuple(gradient for gradient, asked in zip(found, wanted, strict=True) if asked)

    @staticmethod
    def save(ctx: Any, args: tuple, outputs: tuple[Tensor, ...]) -> None:
        ctx.wanted = args[-1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[: 1 + _TENSORS])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *u: Tensor | None) -> tuple[Tensor | None, ...]:
        given = iter(u)
        directions = (next(given) if asked else None for asked in ctx.wanted)
        wanted = list(ctx.needs_input_grad[: 1 + _TENSORS])
        found = _mdlstm_double_backward(*directions, *ctx.saved_tensors, wanted)
        pairs = zip(found, wanted, strict=True)
        return (*(t if asked else None for t, asked in pairs), *(None,) * 4)


# ---- functional form -----------------------------------------------------------------------------


def mdlstm2d(
    input: Tensor, w_ih: Tensor, w_above: Tensor, w_left: Tensor, bias: Tensor | None = None
) -> Tensor:
    """A 2-d LSTM from the top left to the bottom right of a grid.

    ``i, a, b, o = σ(s), g = tanh(s)`` of ``s = W x + U_above h_above + U_left h_left + bias``,
    ``c = a ⊙ c_above + b ⊙ c_left + i ⊙ g``, ``h = o ⊙ tanh(c)``; outside the grid h and c are zero
    (Graves, Fernández and Schmidhuber 2007, without peepholes).

    Args:
        input: ``[height, width, N, input_size]``; float32, float64, bfloat16 or float16.
        w_ih: ``[5H, input_size]``, rows in the order i, a, b, g, o.
        w_above, w_left: ``[5H, H]``, for the states of the two predecessors.
        bias: ``[5H]`` or None.

    Returns:
        h of all sites, ``[height, width, N, H]``.

    Raises:
        RuntimeError: for sizes, dtypes or devices that do not fit.
    """
    args = autocast_arguments(input, w_ih, w_above, w_left, bias)
    return MDLSTM.apply(*args)[0] if needs_grad(*args) else _mdlstm(*args)[0]
