"""Recurrent cells."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft import rnn


def _check_rank(cell: str, name: str, value: Tensor) -> None:
    if value.dim() not in (1, 2):
        raise ValueError(f"{cell}: Expected {name} to be 1D or 2D, got {value.dim()}D instead")


def _parameters(cell: torch.nn.RNNCellBase) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(w_ih, w_hh, b_ih, b_hh); four attributes of a module cost as much as a small step."""
    own: Any = cell._parameters
    try:
        return own["weight_ih"], own["weight_hh"], own["bias_ih"], own["bias_hh"]
    except KeyError:  # parametrized
        return cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh


class LSTMCell(torch.nn.LSTMCell):
    """`torch.nn.LSTMCell` on `weft.functional.lstm_cell`."""

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        if hx is not None and len(hx) == 2 and input.dim() == hx[0].dim() == hx[1].dim() == 2:
            return rnn.lstm_cell(input, hx, *_parameters(self))
        _check_rank("LSTMCell", "input", input)
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
        if hx is None:
            zeros = input.new_zeros(input.size(0), self.hidden_size)
            hx = (zeros, zeros)
        else:
            for index, state in enumerate(hx):
                _check_rank("LSTMCell", f"hx[{index}]", state)
            if not batched:
                hx = (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        h, c = rnn.lstm_cell(input, hx, *_parameters(self))
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))


class GRUCell(torch.nn.GRUCell):
    """`torch.nn.GRUCell` on `weft.functional.gru_cell`."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if hx is not None and input.dim() == hx.dim() == 2:
            return rnn.gru_cell(input, hx, *_parameters(self))
        _check_rank("GRUCell", "input", input)
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
        if hx is None:
            hx = input.new_zeros(input.size(0), self.hidden_size)
        else:
            _check_rank("GRUCell", "hidden", hx)
            if not batched:
                hx = hx.unsqueeze(0)
        h = rnn.gru_cell(input, hx, *_parameters(self))
        return h if batched else h.squeeze(0)


class RNNCell(torch.nn.RNNCell):
    """`torch.nn.RNNCell` on `weft.functional.rnn_cell`."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if hx is not None and input.dim() == hx.dim() == 2:
            return rnn.rnn_cell(input, hx, *_parameters(self), self.nonlinearity)
        _check_rank("RNNCell", "input", input)
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
        if hx is None:
            hx = input.new_zeros(input.size(0), self.hidden_size)
        else:
            _check_rank("RNNCell", "hidden", hx)
            if not batched:
                hx = hx.unsqueeze(0)
        h = rnn.rnn_cell(input, hx, *_parameters(self), self.nonlinearity)
        return h if batched else h.squeeze(0)
