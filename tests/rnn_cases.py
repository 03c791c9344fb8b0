"""Recurrent layers with what torch's lack: problems, and plain steps in torch's own operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weft.rnn_layer import GATES, rnn_layer

PROJECTED = "lstm, projected"
NORMALISED = [f"{cell}, normalised" for cell in ("lstm", "gru", "gru_reset_before", "rnn_tanh")]
CELLS = [*GATES, PROJECTED, *NORMALISED]
SIZE = (5, 4, 3, 19)


def state_size(cell: str, hidden: int) -> int:
    return hidden // 2 + 1 if cell == PROJECTED else hidden


def has_cell(cell: str) -> bool:
    return cell.startswith("lstm")


def problem(
    cell: str,
    size: tuple[int, int, int, int] = SIZE,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The arguments of a layer that have a gradient, by name."""
    steps, batch, inputs, hidden = size
    rows, size_h = GATES[cell.split(",")[0]] * hidden, state_size(cell, hidden)
    sizes: dict[str, tuple[int, ...]] = {"x": (steps, batch, inputs), "h": (batch, size_h)}
    if has_cell(cell):
        sizes["c"] = (batch, hidden)
    sizes |= {"w_ih": (rows, inputs), "w_hh": (rows, size_h), "b_ih": (rows,), "b_hh": (rows,)}
    if "peephole" in cell:
        sizes["peephole"] = (3 * hidden,)
    if cell == PROJECTED:
        sizes["w_hr"] = (size_h, hidden)
    if cell in NORMALISED:
        sizes |= {"norm_ih": (rows,), "norm_hh": (rows,)}
    scaled = {"w_ih", "w_hh", "b_ih", "b_hh", "peephole", "w_hr"}
    given = {name: torch.randn(s, dtype=dtype, device=device) for name, s in sizes.items()}
    for name in scaled & given.keys():
        given[name] *= hidden**-0.5
    given["h"] = given["h"].tanh()  # as a layer's own states: in (-1, 1)
    return {name: t.requires_grad_() for name, t in given.items()}


def masks(
    cell: str, kind: str, size: tuple[int, int, int, int], dtype: torch.dtype, device: Any
) -> dict[str, Any]:
    """What of a step is masked, by the name of the test."""
    steps, batch, _, hidden = size
    lengths = torch.randint(0, steps + 1, (batch,), device=device)
    lengths[0] = steps
    widths = [state_size(cell, hidden)] + ([hidden] if has_cell(cell) else [])
    draws = [torch.rand(steps, batch, width, device=device) for width in widths]
    zones = tuple((draw < 0.3).to(dtype) for draw in draws)
    dropout = (torch.rand(batch, widths[0], device=device) < 0.5).to(dtype) * 2
    return {
        "plain": {},
        "reverse": {"reverse": True},
        "lengths": {"lengths": lengths},
        "reverse lengths": {"lengths": lengths, "reverse": True},
        "resets": {"resets": torch.rand(steps, batch, device=device) < 0.4},
        "dropout": {"dropout": dropout},
        "zoneout": {"zoneout": 0.3},
        "zones": {"zoneout": 0.3, "zones": zones},
        "all": {
            "lengths": lengths,
            "resets": torch.rand(steps, batch, device=device) < 0.4,
            "dropout": dropout,
            "zoneout": 0.3,
            "zones": zones,
            "reverse": True,
        },
    }[kind]


KINDS = (
    "plain",
    "reverse",
    "lengths",
    "reverse lengths",
    "resets",
    "dropout",
    "zoneout",
    "zones",
    "all",
)


def normalised(sums: Tensor, scale: Tensor | None, hidden: int) -> Tensor:
    """Each gate's block of `sums` [B, gates * H] on its own."""
    if scale is None:
        return sums
    blocks = torch.nn.functional.layer_norm(sums.unflatten(-1, (-1, hidden)), (hidden,))
    return blocks.flatten(-2) * scale


def step(
    cell: str,
    xs: Tensor,
    h: Tensor,
    c: Tensor | None,
    fed: Tensor,
    w_hh: Tensor,
    b_hh: Tensor,
    peephole: Tensor | None,
    w_hr: Tensor | None,
    norm: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """(h', c') from the input's sums `xs`; the formulas as they are written in the papers."""
    cell = cell.split(",")[0]
    if cell == "gru_reset_before":
        (xr, xz, xn), (ur, uz, un), (br, bz, bn) = (t.chunk(3, -1) for t in (xs, w_hh.t(), b_hh))
        if norm is not None:
            nr, nz, nn = norm.chunk(3)
            size = h.shape[1]
            r = torch.sigmoid(xr + normalised(fed @ ur, nr, size) + br)
            z = torch.sigmoid(xz + normalised(fed @ uz, nz, size) + bz)
            n = torch.tanh(xn + normalised((r * fed) @ un, nn, size) + bn)
            return (1 - z) * n + z * h, None
        r, z = torch.sigmoid(xr + fed @ ur + br), torch.sigmoid(xz + fed @ uz + bz)
        return (1 - z) * torch.tanh(xn + (r * fed) @ un + bn) + z * h, None
    hs = normalised(fed @ w_hh.t(), norm, h.shape[1]) + b_hh
    if cell == "gru":
        (xr, xz, xn), (hr, hz, hn) = xs.chunk(3, 1), hs.chunk(3, 1)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        return (1 - z) * torch.tanh(xn + r * hn) + z * h, None
    if c is None:
        return (torch.tanh if cell == "rnn_tanh" else torch.relu)(xs + hs), None
    if cell == "lstm_coupled":
        f, g, o = (xs + hs).chunk(3, 1)
        f = torch.sigmoid(f)
        c = f * c + (1 - f) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    i, f, g, o = (xs + hs).chunk(4, 1)
    pi, pf, po = (0, 0, 0) if peephole is None else peephole.chunk(3)
    i, f = torch.sigmoid(i + pi * c), torch.sigmoid(f + pf * c)
    new = f * c + i * torch.tanh(g)
    o = torch.sigmoid(o + po * (c if cell == "lstm_peephole_previous" else new))
    h = o * torch.tanh(new)
    return h if w_hr is None else h @ w_hr.t(), new


def plain(cell: str, options: dict[str, Any]) -> Callable[..., tuple[Tensor, ...]]:
    """The layer, step by step."""
    reverse, zoneout = options.get("reverse", False), options.get("zoneout", 0.0)
    lengths, resets = options.get("lengths"), options.get("resets")

    def run(
        x: Tensor,
        h: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor,
        b_hh: Tensor,
        c: Tensor | None = None,
        peephole: Tensor | None = None,
        w_hr: Tensor | None = None,
        norm_ih: Tensor | None = None,
        norm_hh: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        outputs = [torch.zeros_like(h)] * len(x)
        dropout = options["dropout"].to(x.dtype) if "dropout" in options else None
        zones = [z.to(x.dtype) for z in options.get("zones", ())]
        for time in reversed(range(len(x))) if reverse else range(len(x)):
            old = [h] if c is None else [h, c]
            if resets is not None:
                old = [torch.where(resets[time][:, None], 0, state) for state in old]
            fed = old[0] if dropout is None else old[0] * dropout
            xs = normalised(x[time] @ w_ih.t(), norm_ih, h.shape[1]) + b_ih
            state = old[1] if c is not None else None
            stepped = step(cell, xs, old[0], state, fed, w_hh, b_hh, peephole, w_hr, norm_hh)
            new = [s for s in stepped if s is not None]
            if zoneout > 0:
                keep = [zone[time] for zone in zones] or [zoneout] * len(new)
                new = [k * a + (1 - k) * b for k, a, b in zip(keep, old, new, strict=True)]
            inside = torch.ones(len(h), 1, dtype=torch.bool, device=h.device)
            if lengths is not None:
                inside = (time < lengths)[:, None]
            outputs[time] = torch.where(inside, new[0], 0)
            kept = [h] if c is None else [h, c]
            kept = [torch.where(inside, a, b) for a, b in zip(new, kept, strict=True)]
            h, c = (*kept, None)[:2]
        return torch.stack(outputs), *((h,) if c is None else (h, c))

    return run


def layer(cell: str, options: dict[str, Any]) -> Callable[..., tuple[Tensor, ...]]:
    def run(
        x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, **rest: Tensor
    ) -> tuple[Tensor, ...]:
        state = (h, rest["c"]) if "c" in rest else (h,)
        special: dict[str, Any] = {"peephole": rest.get("peephole"), "w_hr": rest.get("w_hr")}
        if "norm_ih" in rest:
            special["norms"] = (rest["norm_ih"], rest["norm_hh"])
        name = cell.split(",")[0]
        output, final = rnn_layer(name, x, state, w_ih, w_hh, b_ih, b_hh, **special, **options)
        return output, *final

    return run
