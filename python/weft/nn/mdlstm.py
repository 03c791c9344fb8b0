"""The 2-d LSTM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.mdlstm import mdlstm2d

# The axes of [N, C, height, width] that are turned round for each direction.
_FLIPS: tuple[tuple[int, ...], ...] = ((), (3,), (2,), (2, 3))


class MDLSTM2d(torch.nn.Module):
    """A 2-d LSTM over a grid: each site sees the states of the one above and the one to the left.

    ``i, a, b, o = σ(s), g = tanh(s)`` of ``s = W x + U_above h_above + U_left h_left + bias``,
    ``c = a ⊙ c_above + b ⊙ c_left + i ⊙ g``, ``h = o ⊙ tanh(c)``; outside the grid h and c are zero
    (Graves, Fernández and Schmidhuber 2007, without peepholes). The grid is run by anti-diagonals,
    in one op.

    Args:
        input_size: channels of the input.
        hidden_size: H, channels of the output, per direction.
        directions: 1: from the top left; 4: from the top left, top right, bottom left and bottom
            right, each with parameters of its own.
        bias, device, dtype: as in `torch.nn.LSTM`.

    Parameters, for each direction k from 0: ``weight_ih_d{k} [5H, input_size]``,
    ``weight_above_d{k}`` and ``weight_left_d{k} [5H, H]``, ``bias_d{k} [5H]``, rows in the order
    i, a, b, g, o; uniform in ±1/√H at first, as torch's.

    ``forward(input)``: ``[N, input_size, height, width]`` or without N gives
    ``[N, directions · H, height, width]``, directions one after another.

    Raises:
        ValueError: for sizes below 1, or another number of directions.
        RuntimeError: for an input of another rank or number of channels.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        directions: int = 1,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, count in (("input_size", input_size), ("hidden_size", hidden_size)):
            if count < 1:
                raise ValueError(f"MDLSTM2d: {name} must be at least 1, got {count}")
        if directions not in (1, 4):
            raise ValueError(f"MDLSTM2d: directions must be 1 or 4, got {directions!r}")
        self.input_size, self.hidden_size = input_size, hidden_size
        self.directions, self.bias = directions, bool(bias)
        rows = 5 * hidden_size
        sizes: dict[str, tuple[int, ...]] = {
            "weight_ih": (rows, input_size),
            "weight_above": (rows, hidden_size),
            "weight_left": (rows, hidden_size),
        }
        if bias:
            sizes["bias"] = (rows,)
        for direction in range(directions):
            for name, size in sizes.items():
                empty = torch.empty(size, device=device, dtype=dtype)
                self.register_parameter(f"{name}_d{direction}", torch.nn.Parameter(empty))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.hidden_size**-0.5
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        options = f", directions={self.directions}" if self.directions != 1 else ""
        options += "" if self.bias else ", bias=False"
        return f"{self.input_size}, {self.hidden_size}{options}"

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() not in (3, 4) or input.shape[-3] != self.input_size:
            raise RuntimeError(
                f"MDLSTM2d: input must be [N, {self.input_size}, height, width] or without N, "
                f"got {list(input.shape)}"
            )
        x = input if input.dim() == 4 else input.unsqueeze(0)
        outputs = []
        for direction, axes in enumerate(_FLIPS[: self.directions]):
            w_ih, w_above, w_left = (
                getattr(self, f"{name}_d{direction}")
                for name in ("weight_ih", "weight_above", "weight_left")
            )
            bias = getattr(self, f"bias_d{direction}") if self.bias else None
            turned = (x.flip(axes) if axes else x).permute(2, 3, 0, 1)
            found = mdlstm2d(turned, w_ih, w_above, w_left, bias).permute(2, 3, 0, 1)
            outputs.append(found.flip(axes) if axes else found)
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return output if input.dim() == 4 else output.squeeze(0)
