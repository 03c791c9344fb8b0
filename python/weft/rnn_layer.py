"""Recurrent layers over whole sequences: autograd Function and the functional form.

One direction of one layer is one op for all steps, and its backward another; so what
`torch.compile` sees does not grow with the number of steps. Where backward itself is to be
differentiated, it is made again of single steps (`weft.rnn`), which are differentiable as often as
one likes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft import rnn
from weft.autograd import Function, autocast_arguments, needs_grad

_ops = torch.ops.weft
_rnn_layer = _ops.rnn_layer.default
_rnn_layer_gradients = _ops.rnn_layer_gradients.default

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


# ---- fake implementations ------------------------------------------------------------------------


@torch.library.register_fake("weft::rnn_layer")
def _(
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    reverse: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    steps, batch, _ = input.shape
    hidden = w_hh.shape[1]
    is_lstm = cell == "lstm"
    return (
        input.new_empty((steps, batch, hidden)),
        input.new_empty((batch, hidden)),
        input.new_empty((batch if is_lstm else 0, hidden)),
        input.new_empty((steps if keep and is_lstm else 0, batch, hidden)),
        input.new_empty((steps if keep and GATES[cell] > 1 else 0, batch, 4 * hidden)),
    )


@torch.library.register_fake("weft::rnn_layer_gradients")
def _(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    output: Tensor,
    cells: Tensor,
    gates: Tensor,
    lengths: Tensor | None,
    cell: str,
    reverse: bool,
    wanted: list[bool],
) -> list[Tensor]:
    rows = (w_hh.shape[0],)
    sizes = [input.shape, h0.shape, h0.shape, w_ih.shape, w_hh.shape, rows, rows]
    return [input.new_empty(size) for size, asked in zip(sizes, wanted, strict=True) if asked]


# ---- autograd ------------------------------------------------------------------------------------


def _steps(
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """The layer as single steps: (output, h_n) or (output, h_n, c_n)."""
    weights = (w_ih, w_hh, b_ih, b_hh)
    steps = input.shape[0]
    outputs: list[Tensor] = []
    for time in reversed(range(steps)) if reverse else range(steps):
        c_next = c
        if c is not None:
            h_next, c_next = rnn.lstm_cell(input[time], (h, c), *weights)
        elif cell == "gru":
            h_next = rnn.gru_cell(input[time], h, *weights)
        else:
            h_next = rnn.rnn_cell(input[time], h, *weights, cell.removeprefix("rnn_"))
        output = h_next
        if lengths is not None:
            inside = (time < lengths).unsqueeze(1)
            output = torch.where(inside, h_next, 0)
            h_next = torch.where(inside, h_next, h)
            c_next = None if c is None or c_next is None else torch.where(inside, c_next, c)
        h, c = h_next, c_next
        outputs.append(output)
    if reverse:
        outputs.reverse()
    whole = torch.stack(outputs) if outputs else input.new_empty((0, *h.shape))
    return (whole, h) if c is None else (whole, h, c)


class RNNLayer(Function):
    """(output, h_n, c_n, kept cells, kept gates); c_n of a cell without c is empty."""

    @staticmethod
    def compute(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return _rnn_layer(*args, True)

    @staticmethod
    def save(ctx: Any, args: tuple, outputs: tuple[Tensor, ...]) -> None:
        *tensors, ctx.cell, ctx.reverse = args
        output, _, _, cells, gates = outputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(cells, gates)
        ctx.save_for_backward(*tensors, output, cells, gates)

    @staticmethod
    def backward(
        ctx: Any,
        grad_output: Tensor | None,
        grad_h_n: Tensor | None,
        grad_c_n: Tensor | None,
        *_: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        *tensors, lengths, output, cells, gates = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:7])
        none = (None, None, None)  # lengths, cell, reverse
        if torch.is_grad_enabled():
            return (*_gradients_of_steps(ctx, (grad_output, grad_h_n, grad_c_n)), *none)
        input, h0, c0, w_ih, w_hh, *_biases = tensors
        found = iter(
            _rnn_layer_gradients(
                grad_output,
                grad_h_n,
                None if c0 is None else grad_c_n,  # the compiler fills it with zeros
                input,
                h0,
                c0,
                w_ih,
                w_hh,
                output,
                cells,
                gates,
                lengths,
                ctx.cell,
                ctx.reverse,
                wanted,
            )
        )
        return (*(next(found) if asked else None for asked in wanted), *none)


def _gradients_of_steps(ctx: Any, grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Backward as a differentiable function of the arguments and of `grads`."""
    *tensors, lengths, _, _, _ = ctx.saved_tensors
    wanted = [i for i, asked in enumerate(ctx.needs_input_grad[:7]) if asked]

    def layer(*chosen: Tensor) -> tuple[Tensor, ...]:
        arguments: list[Any] = [*tensors, lengths, ctx.cell, ctx.reverse]
        for i, tensor in zip(wanted, chosen, strict=True):
            arguments[i] = tensor
        return _steps(*arguments)

    outputs, pull_back, *_ = torch.func.vjp(layer, *(tensors[i] for i in wanted))
    seeds = (
        torch.zeros_like(output) if grad is None else grad
        for output, grad in zip(outputs, grads, strict=False)
    )
    result: list[Tensor | None] = [None] * 7
    for i, gradient in zip(wanted, pull_back(tuple(seeds)), strict=True):
        result[i] = gradient
    return result


# ---- functional form -----------------------------------------------------------------------------


def rnn_layer(
    cell: str,
    input: Tensor,
    state: tuple[Tensor, ...],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One direction of one recurrent layer over a whole sequence.

    Args:
        cell: "lstm", "gru", "rnn_tanh" or "rnn_relu"; the step is that of
            `weft.functional.{lstm_cell, gru_cell, rnn_cell}`.
        input: ``[T, B, I]``; float32, float64, bfloat16 or float16, as all tensors.
        state: ``(h0,)``, for an LSTM ``(h0, c0)``; each ``[B, H]``.
        w_ih, w_hh, b_ih, b_hh: as the cell's.
        lengths: int64 ``[B]`` or None: how many steps each row has. Beyond them its output is zero
            and its state stays; a reversed layer starts at each row's own last step.
        reverse: from the last step to the first.

    Returns:
        ``(output [T, B, H], (h_n,))``, for an LSTM ``(h_n, c_n)``.

    Raises:
        RuntimeError: for sizes, dtypes or devices that do not fit.
        ValueError: for another cell.
    """
    h0, c0 = state if len(state) == 2 else (state[0], None)
    args = autocast_arguments(input, h0, c0, w_ih, w_hh, b_ih, b_hh)
    if needs_grad(*args):
        output, h_n, c_n, _, _ = RNNLayer.apply(*args, lengths, cell, reverse)
    else:
        output, h_n, c_n, _, _ = _rnn_layer(*args, lengths, cell, reverse, False)
    return output, ((h_n, c_n) if c0 is not None else (h_n,))
