"""Recurrent cells: autograd Functions and the functional API.

A cell's forward is one op: both products and the gates. Backward is one op too as long as no graph
of it is asked for; with ``create_graph`` it is made of differentiable parts, so that its own
backward composes: the elementwise part (whose backward is a kernel that runs the same formulas on
dual numbers) and torch's matrix products.

The Functions' last output, the kept gates, never reaches the user. It stands for the sums before
activation: the double backward hands it the gradient of those, and backward adds it to its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft import _C
from weft.autograd import Function, autocast_arguments, eagerly, inside_transform, needs_grad
from weft.batching import register_batch_rule, register_rows_rule

_ops = torch.ops.weft
_lstm_cell = _ops.lstm_cell.default
_gru_cell = _ops.gru_cell.default
_rnn_cell = _ops.rnn_cell.default


# ---- fake implementations ------------------------------------------------------------------------


def _check_device(op: str, input: Tensor, *others: Tensor | None) -> None:
    """A meta tensor among others brings a call here, past the checks of the compiled op."""
    for other in others:
        if other is not None and other.device != input.device:
            raise RuntimeError(
                f"weft::{op}: expected all tensors to be on the same device, but one is on "
                f"{other.device} and the input on {input.device}"
            )


@torch.library.register_fake("weft::lstm_cell")
def _(
    input: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _check_device("lstm_cell", input, h, c, w_ih, w_hh, *args[:-1])
    batch, hidden = input.shape[0], w_hh.shape[1]
    size = (batch, hidden)
    gates = input.new_empty((batch if args[-1] else 0, 4 * hidden))
    return input.new_empty(size), input.new_empty(size), gates


@torch.library.register_fake("weft::lstm_cell_backward")
def _(
    grad_h: Tensor | None, grad_c: Tensor | None, gates: Tensor, c: Tensor, c_next: Tensor
) -> tuple[Tensor, Tensor]:
    return gates.new_empty(gates.shape), gates.new_empty(c.shape)


@torch.library.register_fake("weft::lstm_cell_double_backward")
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gates, c = args[-2:]
    of_state = [gates.new_empty(c.shape) for _ in range(3)]
    return of_state[0], of_state[1], gates.new_empty(gates.shape), of_state[2]


@torch.library.register_fake("weft::lstm_cell_gradients")
def _(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    gates: Tensor,
    input: Tensor | None,
    h: Tensor | None,
    c: Tensor,
    c_next: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor | None,
    wanted: list[bool],
) -> list[Tensor]:
    batch, columns = gates.shape
    sizes = [
        (batch, w_ih.shape[1]) if w_ih is not None else None,
        c.shape,
        c.shape,
        (columns, input.shape[1]) if input is not None else None,
        (columns, c.shape[1]),
        (columns,),
    ]
    return [
        gates.new_empty(size)
        for size, asked in zip(sizes, wanted, strict=True)
        if asked and size is not None
    ]


@torch.library.register_fake("weft::gru_cell")
def _(input: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    _check_device("gru_cell", input, h, w_ih, w_hh, *args[:-1])
    batch, hidden = input.shape[0], w_hh.shape[1]
    return input.new_empty((batch, hidden)), input.new_empty((batch if args[-1] else 0, 4 * hidden))


@torch.library.register_fake("weft::gru_cell_backward")
def _(grad_h: Tensor, gates: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    size = (h.shape[0], 3 * h.shape[1])
    return gates.new_empty(size), gates.new_empty(size), gates.new_empty(h.shape)


@torch.library.register_fake("weft::gru_cell_double_backward")
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    gates, h = args[-2:]
    return gates.new_empty(h.shape), gates.new_empty(gates.shape), gates.new_empty(h.shape)


@torch.library.register_fake("weft::gru_cell_gradients")
def _(
    grad_h: Tensor,
    gates: Tensor,
    input: Tensor | None,
    h: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor | None,
    wanted: list[bool],
) -> list[Tensor]:
    batch, hidden = h.shape
    sizes = [
        (batch, w_ih.shape[1]) if w_ih is not None else None,
        h.shape,
        (3 * hidden, input.shape[1]) if input is not None else None,
        (3 * hidden, hidden),
        (3 * hidden,),
        (3 * hidden,),
    ]
    return [
        gates.new_empty(size)
        for size, asked in zip(sizes, wanted, strict=True)
        if asked and size is not None
    ]


@torch.library.register_fake("weft::rnn_cell")
def _(input: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, *args: Any) -> Tensor:
    _check_device("rnn_cell", input, h, w_ih, w_hh, *args[:-1])
    return input.new_empty((input.shape[0], w_hh.shape[1]))


@torch.library.register_fake("weft::rnn_cell_gradients")
def _(
    grad_h: Tensor,
    h_next: Tensor,
    input: Tensor | None,
    h: Tensor | None,
    w_ih: Tensor | None,
    w_hh: Tensor | None,
    relu: bool,
    wanted: list[bool],
) -> list[Tensor]:
    batch, hidden = h_next.shape
    sizes = [
        (batch, w_ih.shape[1]) if w_ih is not None else None,
        h_next.shape,
        (hidden, input.shape[1]) if input is not None else None,
        (hidden, hidden),
        (hidden,),
    ]
    return [
        h_next.new_empty(size)
        for size, asked in zip(sizes, wanted, strict=True)
        if asked and size is not None
    ]


# ---- vmap ----------------------------------------------------------------------------------------

register_rows_rule("weft::lstm_cell", (0, 0, 0, *(None,) * 4), (0, 0, 0))
register_rows_rule("weft::gru_cell", (0, 0, *(None,) * 4), (0, 0))
register_rows_rule("weft::rnn_cell", (0, 0, *(None,) * 4), (0,))
for _name in ("lstm_cell", "gru_cell"):
    register_batch_rule(f"weft::{_name}_backward", lambda *_: 1)
    register_batch_rule(f"weft::{_name}_double_backward", lambda *_: 1)


# ---- autograd: LSTM ------------------------------------------------------------------------------


def _in_parts(*grads: Tensor | None) -> bool:
    """Whether backward is made of differentiable parts: neither `torch.vmap` nor its predecessor,
    which `torch.autograd.grad(is_grads_batched=True)` uses, can map the op for it.
    """
    if torch.is_grad_enabled() or inside_transform():
        return True
    if torch.compiler.is_compiling():
        return False
    return any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads)


def _added(gradient: Tensor, more: Tensor | None) -> Tensor:
    return gradient if more is None else gradient + more


class LSTMCell(Function):
    """(h', c', kept gates) of one step."""

    @staticmethod
    def compute(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _lstm_cell(*args, True)

    @staticmethod
    def save(ctx: Any, args: tuple, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        input, h, c, w_ih, w_hh, _, _ = args
        _, c_next, gates = outputs
        of_input, of_h, _, of_w_ih, of_w_hh, _, _ = ctx.needs_input_grad
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            gates,
            c,
            c_next,
            input if of_w_ih else None,
            h if of_w_hh else None,
            w_ih if of_input else None,
            w_hh if of_h else None,
        )

    @staticmethod
    def backward(
        ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None, grad_sums: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        gates, c, c_next, input, h, w_ih, w_hh = ctx.saved_tensors
        *of_arguments, of_b_ih, of_b_hh = ctx.needs_input_grad
        wanted = [*of_arguments, of_b_ih or of_b_hh]
        if _in_parts(grad_h, grad_c) or grad_sums is not None:
            grad_gates, of_c = LSTMCellBackward.apply(grad_h, grad_c, gates, c, c_next)
            grad_gates = _added(grad_gates, grad_sums)
            return (
                grad_gates.mm(w_ih) if wanted[0] else None,
                grad_gates.mm(w_hh) if wanted[1] else None,
                of_c if wanted[2] else None,
                grad_gates.t().mm(input) if wanted[3] else None,
                grad_gates.t().mm(h) if wanted[4] else None,
                grad_gates.sum(0) if of_b_ih else None,
                grad_gates.sum(0) if of_b_hh else None,
            )
        found = _lstm_cell_gradients(grad_h, grad_c, gates, input, h, c, c_next, w_ih, w_hh, wanted)
        if len(found) == 6:
            return (*found, found[5])
        gradients = iter(found)
        *of_arguments, of_bias = [next(gradients) if asked else None for asked in wanted]
        return (*of_arguments, of_bias if of_b_ih else None, of_bias if of_b_hh else None)


class LSTMCellBackward(Function):
    """(gradient of the sums [B, 4H], of c): the elementwise part of backward."""

    @staticmethod
    def compute(*args: Any) -> tuple[Tensor, Tensor]:
        return _ops.lstm_cell_backward(*args)

    @staticmethod
    def save(ctx: Any, args: tuple, outputs: tuple[Tensor, Tensor]) -> None:
        grad_h, grad_c, gates, c, _ = args
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_h, grad_c, gates, c)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, u_gates: Tensor | None, u_c: Tensor | None) -> tuple[Tensor | None, ...]:
        results = _ops.lstm_cell_double_backward(u_gates, u_c, *ctx.saved_tensors)
        asked = zip(results, ctx.needs_input_grad, strict=False)
        return (*(result if needed else None for result, needed in asked), None)


# ---- autograd: GRU -------------------------------------------------------------------------------


class GRUCell(Function):
    """(h', kept gates) of one step."""

    @staticmethod
    def compute(*args: Any) -> tuple[Tensor, Tensor]:
        return _gru_cell(*args, True)

    @staticmethod
    def save(ctx: Any, args: tuple, outputs: tuple[Tensor, Tensor]) -> None:
        input, h, w_ih, w_hh, _, _ = args
        of_input, of_h, of_w_ih, _, _, _ = ctx.needs_input_grad
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            outputs[1],
            h,
            input if of_w_ih else None,
            w_ih if of_input else None,
            w_hh if of_h else None,
        )

    @staticmethod
    def backward(
        ctx: Any, grad_h: Tensor | None, grad_sums: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        gates, h, input, w_ih, w_hh = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if grad_h is None:
            grad_h = torch.zeros_like(h)
        if _in_parts(grad_h) or grad_sums is not None:
            of_x_sums, of_h_sums, of_h = GRUCellBackward.apply(grad_h, gates, h)
            if grad_sums is not None:
                r, z, n, q = grad_sums.chunk(4, 1)
                of_x_sums = of_x_sums + torch.cat([r, z, n], 1)
                of_h_sums = of_h_sums + torch.cat([r, z, q], 1)
            return (
                of_x_sums.mm(w_ih) if wanted[0] else None,
                of_h + of_h_sums.mm(w_hh) if wanted[1] else None,
                of_x_sums.t().mm(input) if wanted[2] else None,
                of_h_sums.t().mm(h) if wanted[3] else None,
                of_x_sums.sum(0) if wanted[4] else None,
                of_h_sums.sum(0) if wanted[5] else None,
            )
        found = _gru_cell_gradients(grad_h, gates, input, h, w_ih, w_hh, wanted)
        if len(found) == 6:
            return tuple(found)
        gradients = iter(found)
        return tuple(next(gradients) if asked else None for asked in wanted)


class GRUCellBackward(Function):
    """(gradient of the input's sums [B, 3H], of the hidden state's, of h): elementwise."""

    @staticmethod
    def compute(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _ops.gru_cell_backward(*args)

    @staticmethod
    def save(ctx: Any, args: tuple, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, u_x: Tensor | None, u_h: Tensor | None, u_prev: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        results = _ops.gru_cell_double_backward(u_x, u_h, u_prev, *ctx.saved_tensors)
        asked = zip(results, ctx.needs_input_grad, strict=True)
        return tuple(result if needed else None for result, needed in asked)


# ---- autograd: Elman -----------------------------------------------------------------------------


class RNNCell(Function):
    """h' of one step. Its slope is a function of h' itself, so h' is all that is kept of it."""

    @staticmethod
    def compute(*args: Any) -> Tensor:
        return _rnn_cell(*args)

    @staticmethod
    def save(ctx: Any, args: tuple, h_next: Tensor) -> None:
        input, h, w_ih, w_hh, _, _, relu = args
        of_input, of_h, of_w_ih, of_w_hh, *_ = ctx.needs_input_grad
        ctx.relu = relu
        ctx.save_for_backward(
            h_next,
            input if of_w_ih else None,
            h if of_w_hh else None,
            w_ih if of_input else None,
            w_hh if of_h else None,
        )

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor | None, ...]:
        h_next, input, h, w_ih, w_hh = ctx.saved_tensors
        *of_arguments, of_b_ih, of_b_hh, _ = ctx.needs_input_grad
        wanted = [*of_arguments, of_b_ih or of_b_hh]
        if _in_parts(grad_h):
            slope = (h_next > 0).to(h_next.dtype) if ctx.relu else 1 - h_next * h_next
            grad = grad_h * slope
            return (
                grad.mm(w_ih) if wanted[0] else None,
                grad.mm(w_hh) if wanted[1] else None,
                grad.t().mm(input) if wanted[2] else None,
                grad.t().mm(h) if wanted[3] else None,
                grad.sum(0) if of_b_ih else None,
                grad.sum(0) if of_b_hh else None,
                None,
            )
        found = iter(_rnn_cell_gradients(grad_h, h_next, input, h, w_ih, w_hh, ctx.relu, wanted))
        *of_arguments, of_bias = [next(found) if asked else None for asked in wanted]
        return (*of_arguments, of_bias if of_b_ih else None, of_bias if of_b_hh else None, None)


_lstm_cell_gradients = _ops.lstm_cell_gradients.default
_gru_cell_gradients = _ops.gru_cell_gradients.default
_rnn_cell_gradients = _ops.rnn_cell_gradients.default


# ---- functional API ------------------------------------------------------------------------------


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | list[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One LSTM step: ``c' = f ⊙ c + i ⊙ g``, ``h' = o ⊙ tanh(c')``.

    ``(i, f, g, o) = (σ, σ, tanh, σ)(W_ih x + b_ih + W_hh h + b_hh)`` (Hochreiter & Schmidhuber
    1997, with the forget gate of Gers et al. 2000). Args as `torch.lstm_cell`.
        input: ``[B, I]``; float32, float64, bfloat16 or float16, as all arguments.
        hx: the state ``(h, c)``, each ``[B, H]``.
        w_ih, w_hh: ``[4H, I]`` and ``[4H, H]``, gates in the order i, f, g, o.
        b_ih, b_hh: ``[4H]`` or None.

    Returns:
        ``(h', c')``, each ``[B, H]``.

    Raises:
        RuntimeError: for sizes, dtypes or devices that do not fit, as torch.
    """
    if len(hx) != 2:
        raise RuntimeError(f"weft::lstm_cell: hx must be two states (h, c), got {len(hx)}")
    found = eagerly(_C.lstm_cell, input, *hx, w_ih, w_hh, b_ih, b_hh)
    if found is not None:
        return found
    args = autocast_arguments(input, *hx, w_ih, w_hh, b_ih, b_hh)
    if needs_grad(*args):
        h_next, c_next, _ = LSTMCell.apply(*args)
    else:
        h_next, c_next, _ = _lstm_cell(*args, False)
    return h_next, c_next


def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One GRU step: ``h' = (1 − z) ⊙ n + z ⊙ h``, the reset gate after the product.

    ``r, z = σ(W_ih x + b_ih + W_hh h + b_hh)``,
    ``n = tanh(W_in x + b_in + r ⊙ (W_hn h + b_hn))``. Cho et al. 2014 write z for torch's 1 − z,
    and reset h before the product. Args as `torch.gru_cell`.
        input: ``[B, I]``; float32, float64, bfloat16 or float16, as all arguments.
        hx: the state h, ``[B, H]``.
        w_ih, w_hh: ``[3H, I]`` and ``[3H, H]``, gates in the order r, z, n.
        b_ih, b_hh: ``[3H]`` or None.

    Returns:
        ``h'``, ``[B, H]``.

    Raises:
        RuntimeError: for sizes, dtypes or devices that do not fit, as torch.
    """
    found = eagerly(_C.gru_cell, input, hx, w_ih, w_hh, b_ih, b_hh)
    if found is not None:
        return found
    args = autocast_arguments(input, hx, w_ih, w_hh, b_ih, b_hh)
    if needs_grad(*args):
        return GRUCell.apply(*args)[0]
    return _gru_cell(*args, False)[0]


def rnn_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One Elman step: ``h' = tanh(W_ih x + b_ih + W_hh h + b_hh)``, or relu of it (Elman 1990).

    Args as `torch.rnn_tanh_cell` and `torch.rnn_relu_cell`.
        input: ``[B, I]``; float32, float64, bfloat16 or float16, as all arguments.
        hx: the state h, ``[B, H]``.
        w_ih, w_hh: ``[H, I]`` and ``[H, H]``.
        b_ih, b_hh: ``[H]`` or None.
        nonlinearity: "tanh" or "relu".

    Returns:
        ``h'``, ``[B, H]``.

    Raises:
        RuntimeError: for sizes, dtypes or devices that do not fit, or another nonlinearity, as
            torch.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise RuntimeError(
            f"weft::rnn_cell: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}"
        )
    relu = nonlinearity == "relu"
    found = eagerly(_C.rnn_cell, input, hx, w_ih, w_hh, b_ih, b_hh, relu)
    if found is not None:
        return found
    args = autocast_arguments(input, hx, w_ih, w_hh, b_ih, b_hh)
    function = RNNCell.apply if needs_grad(*args) else _rnn_cell
    return function(*args, relu)
