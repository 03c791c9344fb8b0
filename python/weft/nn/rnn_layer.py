"""Recurrent layers over whole sequences."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from weft.rnn_layer import random_mask, rnn_layer

_COMMON = ("layer_norm", "zoneout", "recurrent_dropout", "recompute")


def _check_rate(name: str, rate: float) -> float:
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise ValueError(f"{name} should be a number in range [0, 1], got {rate!r}")
    return float(rate)


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


def _packed_rows(packed: PackedSequence) -> tuple[Tensor, Tensor]:
    """Which of the ``T * B`` rows those of `packed.data` are, and the lengths, longest first.

    One index for all steps: torch's own padding copies step by step, in backward whole tensors.
    """
    counts = packed.batch_sizes  # of each step, on the CPU
    steps, batch, rows = len(counts), int(counts[0]), len(packed.data)
    each = torch.arange(max(rows, batch, steps), device=counts.device)
    time = each[:steps].repeat_interleave(counts, output_size=rows)
    row = each[:rows] - (counts.cumsum(0) - counts)[time]
    lengths = (counts.unsqueeze(1) > each[:batch]).sum(0)
    device = packed.data.device
    return (time * batch + row).to(device), lengths.to(device)


class _Layer(torch.nn.RNNBase):
    """What weft's three layers share. Class attributes are those of a converted torch layer."""

    layer_norm: bool = False
    zoneout: float = 0.0
    recurrent_dropout: float = 0.0
    recompute: bool = False
    _states = 1

    def _set_options(
        self, layer_norm: bool, zoneout: float, recurrent_dropout: float, recompute: bool
    ) -> None:
        self.layer_norm = bool(layer_norm)
        self.zoneout = _check_rate("zoneout", zoneout)
        self.recurrent_dropout = _check_rate("recurrent_dropout", recurrent_dropout)
        self.recompute = bool(recompute)

    def _suffixes(self) -> list[str]:
        """Of the parameters' names, a layer and direction each."""
        ends = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{layer}{end}" for layer in range(self.num_layers) for end in ends]

    def _add_norms(self) -> None:
        """Scales of the normalised products; the biases are the shifts."""
        if not self.layer_norm:
            return
        like: Any = self.weight_hh_l0
        for suffix in self._suffixes():
            for side in ("ih", "hh"):
                scale = torch.nn.Parameter(like.new_ones(len(like)))
                self.register_parameter(f"weight_norm_{side}{suffix}", scale)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("weight_norm_"):
                torch.nn.init.ones_(parameter)

    def _parameter(self, name: str) -> Any:
        """The parameter, parametrized or not; an attribute of a module costs as much as a call."""
        own = self._parameters.get(name)
        return own if own is not None else getattr(self, name)

    def _cell(self) -> str:
        return self.mode.lower()

    def _state_size(self) -> int:
        return self.proj_size if self.proj_size > 0 else self.hidden_size

    def _weights(self, suffix: str) -> dict[str, Any]:
        """The parameters of one layer and direction, as `rnn_layer` names them."""
        names = {"w_ih": "weight_ih", "w_hh": "weight_hh"}
        if self.bias:
            names |= {"b_ih": "bias_ih", "b_hh": "bias_hh"}
        if self.proj_size > 0:
            names["w_hr"] = "weight_hr"
        if getattr(self, "peephole", None) is not None:
            names["peephole"] = "weight_peephole"
        weights = {name: self._parameter(start + suffix) for name, start in names.items()}
        if self.layer_norm:
            starts = ("weight_norm_ih", "weight_norm_hh")
            weights["norms"] = tuple([self._parameter(start + suffix) for start in starts])
        return weights

    def own_options(self) -> dict[str, Any]:
        """The options of this layer that torch's does not have."""
        return {
            name: getattr(self, name)
            for name in ("peephole", "coupled_gates", "reset_after", *_COMMON)
            if getattr(self, name, None) != getattr(type(self), name, None)
        }

    def extra_repr(self) -> str:
        own = self.own_options().items()
        return super().extra_repr() + "".join(f", {name}={value}" for name, value in own)

    def _masks(self, x: Tensor, weight: Tensor) -> dict[str, Any]:
        """Recurrent dropout and zoneout of one layer and direction."""
        sizes = (self._state_size(), self.hidden_size)[: self._states]
        masks: dict[str, Any] = {"zoneout": self.zoneout}
        if self.training and self.recurrent_dropout > 0:
            ones = weight.new_ones((x.size(1), sizes[0]))
            masks["dropout"] = F.dropout(ones, self.recurrent_dropout)
        if self.training and self.zoneout > 0:
            masks["zones"] = tuple(
                random_mask(weight, (*x.shape[:2], size), self.zoneout) for size in sizes
            )
        return masks

    def _directions(
        self,
        input: Tensor,
        states: tuple[Any, ...],
        lengths: Tensor | None,
        resets: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All layers and directions on ``[T, B, I]``; of each a state ``[B, H]``."""
        directions = 2 if self.bidirectional else 1
        finals: list[tuple[Tensor, ...]] = []
        suffixes = self._suffixes()
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                weights = self._weights(suffixes[index])
                output, final = rnn_layer(
                    self._cell(),
                    input,
                    tuple([state[index] for state in states]),
                    lengths=lengths,
                    reverse=direction == 1,
                    resets=resets,
                    recompute=self.recompute,
                    **weights,
                    **self._masks(input, weights["w_hh"]),
                )
                outputs.append(output)
                finals.append(final)
            input = outputs[0] if directions == 1 else torch.cat(outputs, 2)
            if self.dropout > 0 and layer < self.num_layers - 1:
                input = F.dropout(input, self.dropout, self.training)
        if len(finals) == 1:
            return input, tuple([final.unsqueeze(0) for final in finals[0]])
        return input, tuple([torch.stack(parts) for parts in zip(*finals, strict=True)])

    def _run(
        self, input: Any, hx: Any, lengths: Tensor | None, resets: Tensor | None
    ) -> tuple[Any, tuple[Tensor, ...]]:
        """torch's contract of `forward`."""
        name, count = type(self).__name__, self._states
        packed = input if isinstance(input, PackedSequence) else None
        if packed is not None:
            if lengths is not None:
                raise ValueError(
                    f"{name}: lengths must be None for a PackedSequence, which has its own"
                )
            rows, lengths = _packed_rows(packed)
            steps, batch, features = len(packed.batch_sizes), len(lengths), packed.data.size(-1)
            whole = packed.data.new_zeros((steps * batch, features))
            x = whole.index_copy(0, rows, packed.data).view(steps, batch, features)
            batched = True
        else:
            if input.dim() not in (2, 3):
                raise ValueError(
                    f"{name}: Expected input to be 2D or 3D, got {input.dim()}D instead"
                )
            batched = input.dim() == 3
            x = input if batched else input.unsqueeze(1)
            if batched and self.batch_first:
                x = x.transpose(0, 1)
            if lengths is not None and not batched:
                raise ValueError(f"{name}: lengths are for a batched input, got a 2D one")
        if resets is not None:
            resets = self._given_resets(resets, x, packed, batched)
        layers, batch = self.num_layers * (2 if self.bidirectional else 1), x.size(1)
        sizes = (self._state_size(), self.hidden_size)[:count]
        states: tuple[Any, ...]
        if hx is None:
            states = tuple([[x.new_zeros(batch, size)] * layers for size in sizes])
        else:
            _check_state(self, hx, batched, count)
            states = tuple(hx) if count == 2 else (hx,)
            if not batched:
                states = tuple(state.unsqueeze(1) for state in states)
            if packed is not None and packed.sorted_indices is not None:
                states = tuple(state.index_select(1, packed.sorted_indices) for state in states)
        fit = x.dtype == self._parameter("weight_ih_l0").dtype and x.size(2) == self.input_size
        if hx is not None:
            fit = fit and [s.shape for s in states] == [(layers, batch, size) for size in sizes]
        if not fit:
            self._raise_for_sizes(x, states if hx is not None else None)

        output, finals = self._directions(x, states, lengths, resets)

        if packed is not None:
            data = output.flatten(0, 1).index_select(0, rows)
            if packed.unsorted_indices is not None:
                finals = tuple(state.index_select(1, packed.unsorted_indices) for state in finals)
            return packed._replace(data=data), finals
        if not batched:
            return output.squeeze(1), tuple(state.squeeze(1) for state in finals)
        return output.transpose(0, 1) if self.batch_first else output, finals

    def _raise_for_sizes(self, x: Tensor, states: tuple[Tensor, ...] | None) -> None:
        """torch's errors. It raises none where autocast will give the input the weights' dtype."""
        self._update_flat_weights()
        input = x.transpose(0, 1) if self.batch_first else x
        self.check_input(input, None)
        if states is not None:
            hidden: Any = states if self._states == 2 else states[0]
            self.check_forward_args(input, hidden, None)

    def _given_resets(
        self, resets: Tensor, x: Tensor, packed: PackedSequence | None, batched: bool
    ) -> Tensor:
        """``[T, B]`` in the order of x."""
        steps, batch = x.shape[:2]
        sizes = ((batch, steps) if self.batch_first else (steps, batch)) if batched else (steps,)
        if tuple(resets.shape) != sizes:
            raise RuntimeError(
                f"{type(self).__name__}: resets must be {list(sizes)}, got {list(resets.shape)}"
            )
        if not batched:
            return resets.unsqueeze(1)
        if self.batch_first:
            resets = resets.transpose(0, 1)
        if packed is not None and packed.sorted_indices is not None:
            resets = resets.index_select(1, packed.sorted_indices)
        return resets


class _OneState(_Layer):
    """A layer whose state is h alone."""

    def forward(
        self,
        input: Any,
        hx: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> Any:
        output, (h_n,) = self._run(input, hx, lengths, resets)
        return output, h_n


class RNN(_OneState, torch.nn.RNN):
    """`torch.nn.RNN`, each layer and direction one op over the whole sequence.

    Args:
        layer_norm: W_ih x and W_hh h are normalised, each gate's ``hidden_size`` sums on their own,
            ``scale ⊙ (s − mean) / sqrt(variance + 1e-5)``, before biases, which are the shifts, and
            peepholes are added (Ba, Kiros and Hinton 2016). The scales are parameters
            ``weight_norm_{ih,hh}_l{k}[_reverse]``, ``[gates · hidden_size]``, ones at first.
        zoneout: probability that a unit keeps its old state at a step; in evaluation it keeps that
            part of it (Krueger et al. 2016).
        recurrent_dropout: probability that the product with W_hh does not see a unit of the state,
            drawn once per sequence, in training only; the others are scaled (Gal and Ghahramani
            2016).
        recompute: keep nothing of the steps for backward, which runs forward again.
        others: as `torch.nn.RNN`.

    ``forward(input, hx=None, lengths=None, resets=None)``: `lengths`, int64 ``[N]``, says how many
    steps each row has; beyond them its output is zero and its state stays, and the reverse
    direction starts at each row's own last step, as packing would. `resets`, bool ``[T, N]`` (with
    `batch_first` ``[N, T]``), restarts a row from a state of zeros before that step, in either
    direction's own order, and no gradient passes there.

    Raises:
        ValueError: for a rate outside [0, 1]; for `lengths` with a PackedSequence or an unbatched
            input.
        RuntimeError: for `lengths` or `resets` of another shape or dtype, lengths out of range.
    """

    def __init__(
        self,
        *args: Any,
        layer_norm: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        torch.nn.RNN.__init__(self, *args, **kwargs)
        self._set_options(layer_norm, zoneout, recurrent_dropout, recompute)
        self._add_norms()


class GRU(_OneState, torch.nn.GRU):
    """`torch.nn.GRU`, each layer and direction one op over the whole sequence.

    Args:
        reset_after: False is the original GRU, ``n = tanh(W x + b + U (r ⊙ h) + b')`` (Cho et al.
            2014); True is torch's, ``n = tanh(W x + b + r ⊙ (U h + b'))``. In both
            ``h = (1 − z) ⊙ n + z ⊙ h``.
        others: as `weft.nn.RNN` and `torch.nn.GRU`.

    ``forward`` and errors as `weft.nn.RNN`.
    """

    reset_after: bool = True

    def __init__(
        self,
        *args: Any,
        reset_after: bool = True,
        layer_norm: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        torch.nn.GRU.__init__(self, *args, **kwargs)
        self._set_options(layer_norm, zoneout, recurrent_dropout, recompute)
        self.reset_after = bool(reset_after)
        self._add_norms()

    def _cell(self) -> str:
        return "gru" if self.reset_after else "gru_reset_before"


class LSTM(_Layer, torch.nn.LSTM):
    """`torch.nn.LSTM`, each layer and direction one op over the whole sequence.

    Args:
        peephole: "standard": ``i, f = σ(… + p ⊙ c_{t−1})`` and ``o = σ(… + p_o ⊙ c_t)`` (Gers and
            Schmidhuber 2000); "previous": all three see ``c_{t−1}``. The weights are parameters
            ``weight_peephole_l{k}[_reverse]``, ``[3 · hidden_size]`` in the order i, f, o.
        coupled_gates: ``c = f ⊙ c + (1 − f) ⊙ g``, no input gate (Greff et al. 2015); weights and
            biases are of ``[3 · hidden_size, …]``, rows f, g, o.
        layer_norm, zoneout, recurrent_dropout, recompute: as `weft.nn.RNN`; zoneout draws for h
            and c each.
        others: as `torch.nn.LSTM`. ``proj_size`` goes with all of these; zoneout and recurrent
            dropout then mask the projected h.

    ``forward`` and errors as `weft.nn.RNN`.

    Raises:
        ValueError: for another `peephole`, and for `peephole` with `coupled_gates`, which exclude
            each other.
    """

    peephole: str | None = None
    coupled_gates: bool = False
    _states = 2

    def __init__(
        self,
        *args: Any,
        peephole: Literal["standard", "previous"] | None = None,
        coupled_gates: bool = False,
        layer_norm: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        if peephole not in (None, "standard", "previous"):
            raise ValueError(
                f"LSTM: peephole must be None, 'standard' or 'previous', got {peephole!r}"
            )
        if peephole is not None and coupled_gates:
            raise ValueError("LSTM: peephole and coupled_gates exclude each other, got both")
        torch.nn.LSTM.__init__(self, *args, **kwargs)
        self._set_options(layer_norm, zoneout, recurrent_dropout, recompute)
        self.peephole = peephole
        self.coupled_gates = bool(coupled_gates)
        if coupled_gates:
            for name, parameter in list(self.named_parameters()):
                if name.startswith("weight_hr"):
                    continue
                sizes = (3 * self.hidden_size, *parameter.shape[1:])
                setattr(self, name, torch.nn.Parameter(parameter.new_empty(sizes)))
        if peephole is not None:
            like: Any = self.weight_hh_l0
            for suffix in self._suffixes():
                weight = torch.nn.Parameter(like.new_empty(3 * self.hidden_size))
                self.register_parameter(f"weight_peephole{suffix}", weight)
        if coupled_gates or peephole is not None:
            self.reset_parameters()
        self._add_norms()

    def flatten_parameters(self) -> None:
        """For cuDNN, which has no coupled gates."""
        if not self.coupled_gates:
            torch.nn.LSTM.flatten_parameters(self)

    def _cell(self) -> str:
        if self.coupled_gates:
            return "lstm_coupled"
        return {None: "lstm", "standard": "lstm_peephole", "previous": "lstm_peephole_previous"}[
            self.peephole
        ]

    def forward(
        self,
        input: Any,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> Any:
        return self._run(input, hx, lengths, resets)
