"""Recurrent layers over whole sequences."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from weft.rnn_layer import rnn_layer


def _directions(
    module: torch.nn.RNNBase,
    cell: str,
    input: Tensor,
    states: tuple[Tensor, ...],
    lengths: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All layers and directions on ``[T, B, I]``; states ``[layers * directions, B, H]``."""
    directions = 2 if module.bidirectional else 1
    finals: list[tuple[Tensor, ...]] = []
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            state = tuple(state[index] for state in states)
            weights = [*module.all_weights[index], None, None][:4]
            rest: list[Any] = [*weights, lengths, direction == 1]
            output, final = rnn_layer(cell, input, state, *rest)
            outputs.append(output)
            finals.append(final)
        input = outputs[0] if directions == 1 else torch.cat(outputs, 2)
        if module.dropout > 0 and layer < module.num_layers - 1:
            input = F.dropout(input, module.dropout, module.training)
    return input, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))


def _check_state(module: torch.nn.RNNBase, hx: Any, batched: bool, count: int) -> None:
    """The errors that torch's `forward` raises for the rank of a state."""
    tensors = hx if count == 2 else (hx,)
    rank = 3 if batched else 2
    if len(tensors) == count and all(t.dim() == rank for t in tensors):
        return
    name = "hx" if count == 2 else "hidden state"
    got = ", ".join(f"{t.dim()}-D" for t in tensors)
    raise RuntimeError(
        f"For {'batched' if batched else 'unbatched'} {rank}-D input, {name} should also be "
        f"{rank}-D but got {got}"
    )


def _forward(
    module: torch.nn.RNNBase, cell: str, input: Any, hx: Any, count: int
) -> tuple[Any, tuple[Tensor, ...]]:
    """torch's contract of `forward` for a layer with `count` states."""
    module._update_flat_weights()
    packed = input if isinstance(input, PackedSequence) else None
    lengths = None
    if packed is not None:
        x, on_cpu = pad_packed_sequence(packed._replace(sorted_indices=None, unsorted_indices=None))
        lengths = on_cpu.to(x.device)
        batched = True
    else:
        if input.dim() not in (2, 3):
            raise ValueError(
                f"{type(module).__name__}: Expected input to be 2D or 3D, "
                f"got {input.dim()}D instead"
            )
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        if batched and module.batch_first:
            x = x.transpose(0, 1)
    if hx is None:
        layers = module.num_layers * (2 if module.bidirectional else 1)
        zeros = x.new_zeros(layers, x.size(1), module.hidden_size)
        states: tuple[Tensor, ...] = (zeros,) * count
    else:
        _check_state(module, hx, batched, count)
        states = tuple(hx) if count == 2 else (hx,)
        if not batched:
            states = tuple(state.unsqueeze(1) for state in states)
        if packed is not None and packed.sorted_indices is not None:
            states = tuple(state.index_select(1, packed.sorted_indices) for state in states)
    hidden: Any = states if count == 2 else states[0]
    module.check_forward_args(x if not module.batch_first else x.transpose(0, 1), hidden, None)

    output, finals = _directions(module, cell, x, states, lengths)

    if packed is not None:
        data = pack_padded_sequence(output, on_cpu, enforce_sorted=True).data
        if packed.unsorted_indices is not None:
            finals = tuple(state.index_select(1, packed.unsorted_indices) for state in finals)
        return packed._replace(data=data), finals
    if not batched:
        return output.squeeze(1), tuple(state.squeeze(1) for state in finals)
    return output.transpose(0, 1) if module.batch_first else output, finals


class RNN(torch.nn.RNN):
    """`torch.nn.RNN`, each layer and direction one op over the whole sequence."""

    def forward(self, input: Any, hx: Tensor | None = None) -> Any:
        output, (h_n,) = _forward(self, self.mode.lower(), input, hx, 1)
        return output, h_n


class GRU(torch.nn.GRU):
    """`torch.nn.GRU`, each layer and direction one op over the whole sequence."""

    def forward(self, input: Any, hx: Tensor | None = None) -> Any:
        output, (h_n,) = _forward(self, "gru", input, hx, 1)
        return output, h_n


class LSTM(torch.nn.LSTM):
    """`torch.nn.LSTM`, each layer and direction one op over the whole sequence.

    With ``proj_size`` it runs torch's own kernels.
    """

    def forward(self, input: Any, hx: tuple[Tensor, Tensor] | None = None) -> Any:
        if self.proj_size > 0:
            return super().forward(input, hx)
        return _forward(self, "lstm", input, hx, 2)
