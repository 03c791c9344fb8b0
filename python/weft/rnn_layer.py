"""Recurrent layers over whole sequences: autograd Functions and the functional form.

One direction of one layer is one op for all steps, its backward another, and the backward of that a
third, which runs the same kernels on dual numbers; so what `torch.compile` sees does not grow with
the number of steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from weft import _C
from weft.autograd import Function, autocast_arguments, eagerly, needs_grad
from weft.batching import register_rows_rule

_ops = torch.ops.weft
_rnn_layer = _ops.rnn_layer.default
_rnn_layer_gradients = _ops.rnn_layer_gradients.default
_rnn_layer_double_backward = _ops.rnn_layer_double_backward.default

# Rows of the weights for one hidden unit.
GATES = {
    "lstm": 4,
    "lstm_peephole": 4,
    "lstm_peephole_previous": 4,
    "lstm_coupled": 3,
    "gru": 3,
    "gru_reset_before": 3,
    "rnn_tanh": 1,
    "rnn_relu": 1,
}

# Arguments of a layer that have a gradient, masks that have none, and what backward is given of
# the steps.
_TENSORS, _MASKS, _KEPT = 11, 5, 5


# ---- fake implementations ------------------------------------------------------------------------


@torch.library.register_fake("weft::rnn_layer")
def _(*args: Any) -> tuple[Tensor, ...]:
    input, h0, c0, _, w_hh = args[:5]
    norm_hh = args[_TENSORS - 1]
    zoneout, cell, _, keep = args[-4:]
    steps, batch, _ = input.shape
    size, hidden = h0.shape[1], w_hh.shape[0] // GATES[cell]
    kept = 4 if cell == "gru" else GATES[cell]
    keeps_gates = keep and (kept > 1 or zoneout > 0)
    products = (steps if keep and norm_hh is not None else 0, batch, w_hh.shape[0])
    return (
        input.new_empty((steps, batch, size)),
        input.new_empty((batch, size)),
        input.new_empty((batch if c0 is not None else 0, hidden)),
        input.new_empty((steps if keep and c0 is not None else 0, batch, hidden)),
        input.new_empty((steps if keeps_gates else 0, batch, kept * hidden)),
        input.new_empty(products),
        input.new_empty(products),
    )


def _argument_sizes(input: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, cell: str) -> list[Any]:
    rows, size = w_hh.shape
    hidden = rows // GATES[cell]
    c0, weights = (h0.shape[0], hidden), [w_ih.shape, w_hh.shape, (rows,), (rows,)]
    own = [(3 * hidden,), (size, hidden), (rows,), (rows,)]
    return [input.shape, h0.shape, c0, *weights, *own]


def _wanted(like: Tensor, sizes: list[Any], wanted: list[bool]) -> tuple[Tensor, ...]:
    pairs = zip(sizes, wanted, strict=True)
    return tuple(like.new_empty(size if asked else (0,)) for size, asked in pairs)


@torch.library.register_fake("weft::rnn_layer_gradients")
def _(*args: Any) -> tuple[Tensor, ...]:
    input, h0, _, w_ih, w_hh = args[3:8]
    return _wanted(input, _argument_sizes(input, h0, w_ih, w_hh, args[-3]), args[-1])


@torch.library.register_fake("weft::rnn_layer_double_backward")
def _(*args: Any) -> tuple[Tensor, ...]:
    input, h0, _, w_ih, w_hh = args[_TENSORS + 3 : _TENSORS + 8]
    of_arguments = _argument_sizes(input, h0, w_ih, w_hh, args[-3])
    whole = (*input.shape[:2], h0.shape[1])
    return _wanted(input, [whole, *of_arguments[1:3], *of_arguments], args[-1])


@torch.library.register_fake("weft::random_mask")
def _(seed: Tensor, like: Tensor, size: Any, p: float) -> Tensor:
    return like.new_empty(size)


# ---- vmap ----------------------------------------------------------------------------------------

# The axis of rows of: input, h0, c0 and eight parameters; output, h_n and c_n; lengths, resets and
# masks; what is kept of the steps.
_LAYER_ROWS = (1, 0, 0, *(None,) * (_TENSORS - 3))
_STATE_ROWS = (1, 0, 0)
_MASK_ROWS = (0, 1, 0, 1, 1)
_KEPT_ROWS = (1,) * _KEPT

register_rows_rule("weft::random_mask", (None, None), (None,))
register_rows_rule("weft::rnn_layer", (*_LAYER_ROWS, *_MASK_ROWS), (*_STATE_ROWS, *_KEPT_ROWS[1:]))
register_rows_rule(
    "weft::rnn_layer_gradients",
    (*_STATE_ROWS, *_LAYER_ROWS[:-2], *_KEPT_ROWS, *_MASK_ROWS),
    _LAYER_ROWS,
    wanted=True,
)
register_rows_rule(
    "weft::rnn_layer_double_backward",
    (*_LAYER_ROWS, *_STATE_ROWS, *_LAYER_ROWS, *_MASK_ROWS),
    (*_STATE_ROWS, *_LAYER_ROWS),
    wanted=True,
)


# ---- autograd ------------------------------------------------------------------------------------


def _spread(found: Any, wanted: Any) -> Iterator[Any]:
    """`found` where `wanted` is true, None elsewhere."""
    results = iter(found)
    return (next(results) if asked else None for asked in wanted)


class RNNLayer(Function):
    """(output, h_n, c_n, then what is kept of the steps); c_n of a cell without c is empty.

    Arguments: those of the op, the last being whether backward computes the gates again.
    """

    @staticmethod
    def compute(*args: Any) -> tuple[Tensor, ...]:
        *arguments, recompute = args
        return _rnn_layer(*arguments, not recompute)

    @staticmethod
    def save(ctx: Any, args: tuple, outputs: tuple[Tensor, ...]) -> None:
        *tensors, ctx.zoneout, ctx.cell, ctx.reverse, ctx.recompute = args
        output, _, _, *kept = outputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(*tensors, *(() if ctx.recompute else (output, *kept)))

    @staticmethod
    def backward(
        ctx: Any,
        grad_output: Tensor | None,
        grad_h_n: Tensor | None,
        grad_c_n: Tensor | None,
        *_: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        tensors, kept = saved[: _TENSORS + _MASKS], saved[_TENSORS + _MASKS :]
        how = (ctx.zoneout, ctx.cell, ctx.reverse)
        if ctx.recompute:
            with torch.no_grad():
                output, _, _, *rest = _rnn_layer(*tensors, *how, True)
            kept = (output, *rest)
        if tensors[2] is None:
            grad_c_n = None  # the compiler fills it with zeros
        wanted = ctx.needs_input_grad[:_TENSORS]
        call = RNNLayerGradients.apply if torch.is_grad_enabled() else RNNLayerGradients.compute
        found = call(grad_output, grad_h_n, grad_c_n, *tensors, *kept, *how, wanted)
        return (*_spread(found, wanted), *(None,) * (_MASKS + 4))


class RNNLayerGradients(Function):
    """Those gradients of a layer's arguments that are wanted."""

    @staticmethod
    def compute(*args: Any) -> tuple[Tensor, ...]:
        *tensors, zoneout, cell, reverse, wanted = args
        grads, layer = tensors[:3], tensors[3 : 3 + _TENSORS]
        end = 3 + _TENSORS + _MASKS
        masks, kept = tensors[3 + _TENSORS : end], tensors[end:]
        layer = [*layer[:5], *layer[7:]]  # the biases are not needed
        how = (zoneout, cell, reverse, list(wanted))
        found = _rnn_layer_gradients(*grads, *layer, *kept, *masks, *how)
        return tuple(gradient for gradient, asked in zip(found, wanted, strict=True) if asked)

    @staticmethod
    def save(ctx: Any, args: tuple, outputs: tuple[Tensor, ...]) -> None:
        *tensors, ctx.zoneout, ctx.cell, ctx.reverse, ctx.wanted = args
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[: 3 + _TENSORS + _MASKS])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *u: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[: 3 + _TENSORS])
        found = _rnn_layer_double_backward(
            *_spread(u, ctx.wanted),
            *ctx.saved_tensors,
            ctx.zoneout,
            ctx.cell,
            ctx.reverse,
            wanted,
        )
        pairs = zip(found, wanted, strict=True)
        return (*(t if asked else None for t, asked in pairs), *(None,) * (_MASKS + _KEPT + 4))


# ---- masks ---------------------------------------------------------------------------------------


def random_mask(like: Tensor, size: tuple[int, ...], p: float) -> Tensor:
    """Ones with probability `p`, elsewhere zeros, of the dtype and device of `like`."""
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=like.device)
    return _ops.random_mask(seed, like.detach(), size, p)


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
    *,
    peephole: Tensor | None = None,
    w_hr: Tensor | None = None,
    norms: tuple[Tensor, Tensor] | None = None,
    resets: Tensor | None = None,
    dropout: Tensor | None = None,
    zoneout: float = 0.0,
    zones: tuple[Tensor, ...] = (),
    recompute: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One direction of one recurrent layer over a whole sequence.

    Args:
        cell: "lstm", "gru", "rnn_tanh" or "rnn_relu": the step is that of
            `weft.functional.{lstm_cell, gru_cell, rnn_cell}`; or "lstm_peephole",
            "lstm_peephole_previous", "lstm_coupled", as `weft.nn.LSTM` tells; or
            "gru_reset_before", as `weft.nn.GRU` tells.
        input: ``[T, B, I]``; float32, float64, bfloat16 or float16, as all tensors.
        state: ``(h0,)``, for an LSTM ``(h0, c0)``; each ``[B, H]``, h0 of a projection ``[B, P]``.
        w_ih, w_hh, b_ih, b_hh: as the cell's; of "lstm_coupled" ``[3H, ...]``, rows f, g, o.
        lengths: int64 ``[B]`` or None: how many steps each row has. Beyond them its output is zero
            and its state stays; a reversed layer starts at each row's own last step.
        reverse: from the last step to the first.
        peephole: ``[3H]``, for i, f, o; the cells with peepholes only.
        w_hr: ``[P, H]``, an LSTM's projection of h; then W_hh is ``[4H, P]``.
        norms: scales ``[rows of w_ih]`` of W_ih x and of W_hh h, each gate's H of which are then
            normalised: ``scale ⊙ (s − mean) / sqrt(variance + 1e-5)``, to which the bias is added.
        resets: bool ``[T, B]`` or None: where true, that step starts from a state of zeros, in
            either direction, and no gradient passes.
        dropout: as h0, or None: multiplies the state as W_hh sees it, at all steps.
        zoneout: how much of the old state each unit keeps, from 0 to 1.
        zones: in its place, for each state a mask, ``[T, …]`` of it: 1 where the old one is kept.
        recompute: keep nothing of the steps; backward runs forward again.

    Returns:
        ``(output [T, B, H or P], (h_n,))``, for an LSTM ``(h_n, c_n)``.

    Raises:
        RuntimeError: for sizes, dtypes or devices that do not fit, lengths out of range.
        ValueError: for another cell.
    """
    h0, c0 = state if len(state) == 2 else (state[0], None)
    zone_h, zone_c = (*zones, None, None)[:2]
    norm_ih, norm_hh = norms or (None, None)
    layer = (input, h0, c0, w_ih, w_hh, b_ih, b_hh, peephole, w_hr, norm_ih, norm_hh)
    how = (zoneout, cell, reverse)
    args = (*layer, lengths, resets, dropout, zone_h, zone_c, *how)
    found = eagerly(_C.rnn_layer, *args, recompute)
    if found is None:
        *layer, dropout, zone_h, zone_c = autocast_arguments(*layer, dropout, zone_h, zone_c)
        args = (*layer, lengths, resets, dropout, zone_h, zone_c, *how)
        differentiated = needs_grad(*layer)
        found = RNNLayer.apply(*args, recompute) if differentiated else _rnn_layer(*args, False)
    output, h_n, c_n, *_ = found
    return output, ((h_n, c_n) if c0 is not None else (h_n,))
