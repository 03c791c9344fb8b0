"""Recurrent variants as one writes them in PyTorch without a kernel: step by step.

They are the baseline of what torch's layers lack: one product for the input of all steps, then a
Python loop of torch's own operations.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft import nn

# weft's layer with these options, by the name of the row.
VARIANTS: dict[str, tuple[type[torch.nn.Module], dict[str, Any]]] = {
    "lstm_peephole": (nn.LSTM, {"peephole": "standard"}),
    "lstm_coupled": (nn.LSTM, {"coupled_gates": True}),
    "lstm_layer_norm": (nn.LSTM, {"layer_norm": True}),
    "gru_reset_before": (nn.GRU, {"reset_after": False}),
    "gru_layer_norm": (nn.GRU, {"layer_norm": True}),
}


class Steps(torch.nn.Module):
    """The steps of `layer`, one of `VARIANTS` of one layer and one direction, on its parameters."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def _normalised(self, sums: Tensor, side: str, first: int = 0, count: int | None = None) -> Any:
        """`count` gates of `sums` from `first` on, each normalised if the layer is."""
        if not self.layer.layer_norm:
            return sums
        size = self.layer.hidden_size
        scale = getattr(self.layer, f"weight_norm_{side}_l0")
        if count is not None:
            scale = scale[first * size : (first + count) * size]
        blocks = F.layer_norm(sums.unflatten(-1, (-1, size)), (size,))
        return blocks.flatten(-2) * scale

    def forward(self, input: Tensor) -> tuple[Tensor, Any]:
        layer = self.layer
        sums = self._normalised(input @ layer.weight_ih_l0.t(), "ih") + layer.bias_ih_l0
        h = input.new_zeros(input.size(1), layer.hidden_size)
        if isinstance(layer, nn.GRU):
            outputs = []
            for x in sums.unbind(0):
                h = self._gru(x, h)
                outputs.append(h)
            return torch.stack(outputs), h
        c, outputs = h, []
        for x in sums.unbind(0):
            h, c = self._lstm(x, h, c)
            outputs.append(h)
        return torch.stack(outputs), (h, c)

    def _gru(self, x: Tensor, h: Tensor) -> Tensor:
        layer = self.layer
        w, b = layer.weight_hh_l0, layer.bias_hh_l0
        if layer.reset_after:
            u = self._normalised(h @ w.t(), "hh") + b
            (xr, xz, xn), (ur, uz, un) = x.chunk(3, 1), u.chunk(3, 1)
            r, z = torch.sigmoid(xr + ur), torch.sigmoid(xz + uz)
            n = torch.tanh(xn + r * un)
        else:
            two = 2 * layer.hidden_size
            gates = self._normalised(h @ w[:two].t(), "hh", 0, 2) + b[:two]
            r, z = torch.sigmoid(x[:, :two] + gates).chunk(2, 1)
            u = self._normalised((r * h) @ w[two:].t(), "hh", 2, 1)
            n = torch.tanh(x[:, two:] + u + b[two:])
        return n + z * (h - n)

    def _lstm(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        layer = self.layer
        sums = x + self._normalised(h @ layer.weight_hh_l0.t(), "hh") + layer.bias_hh_l0
        if layer.coupled_gates:
            f, g, o = sums.chunk(3, 1)
            f = torch.sigmoid(f)
            c = f * c + (1 - f) * torch.tanh(g)
            return torch.sigmoid(o) * torch.tanh(c), c
        i, f, g, o = sums.chunk(4, 1)
        if layer.peephole is None:
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            return torch.sigmoid(o) * torch.tanh(c), c
        pi, pf, po = layer.weight_peephole_l0.chunk(3)
        c = torch.sigmoid(f + pf * c) * c + torch.sigmoid(i + pi * c) * torch.tanh(g)
        return torch.sigmoid(o + po * c) * torch.tanh(c), c
