"""Random problems whose tensors lie between pages that cannot be touched.

A kernel that reads past either end of an input is killed by the processor, in the build that users
have, on every CPU target. `test_guarded_memory.py` runs this file in a process of its own:
python guarded_problems.py FAMILY SEED COUNT
"""

from __future__ import annotations

import ctypes
import mmap
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import weft
import weft.functional as F
import weft.nn
from weft import _C
from weft.testing import cpu_target

PAGE = mmap.PAGESIZE
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

libc = ctypes.CDLL(None, use_errno=True)


class Guarded:
    """Copies of tensors whose last byte (or first) is the last before a page without access."""

    def __init__(self, at_front: bool, channels_last: bool = False) -> None:
        self.at_front = at_front
        self.channels_last = channels_last
        self._maps: list[mmap.mmap] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        inside = -(-size // PAGE) * PAGE
        pages = mmap.mmap(-1, inside + 2 * PAGE)
        self._maps.append(pages)
        start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        for fence in (start, start + PAGE + inside):
            if libc.mprotect(ctypes.c_void_p(fence), PAGE, 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        offset = PAGE if self.at_front else PAGE + inside - size
        flat = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        form = torch.contiguous_format
        if self.channels_last and tensor.dim() in (4, 5):
            form = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
        strides = torch.empty(tensor.shape, memory_format=form).stride()
        return flat.as_strided(tensor.shape, strides).copy_(tensor)


def forward_and_backward(
    guard: Guarded, function: Callable[..., Tensor], inputs: list[Tensor]
) -> None:
    """All gradients at once, each input's alone, and the way without gradients."""
    guarded = [guard(t).requires_grad_() for t in inputs]
    with torch.no_grad():
        function(*guarded)
    out = function(*guarded)
    grad = guard(torch.ones_like(out))
    torch.autograd.grad(out, guarded, grad)
    for tensor in guarded[:2]:
        torch.autograd.grad(function(*guarded), tensor, grad)


def convolution(r: random.Random, guard: Guarded, dtype: torch.dtype) -> None:
    rank = r.choice([1, 2, 2, 2, 3])
    high = 7 if rank < 3 else 3
    groups, inner, outer = r.choice(
        [
            (r.randint(1, 70), 1, 1),
            (r.randint(1, 20), 1, r.randint(2, 4)),
            (r.randint(2, 6), r.randint(1, 20), r.randint(1, 20)),
            (1, r.randint(1, 80), r.randint(1, 80)),
        ]
    )
    window = [1] * rank if r.random() < 0.15 else [r.randint(1, high) for _ in range(rank)]
    stride = [r.choice([1, 1, 2, 3]) for _ in range(rank)]
    dilation = [r.choice([1, 1, 1, 2]) for _ in range(rank)]
    span = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    padding = [r.randint(0, s - 1) for s in span]
    extents = [
        max(r.randint(1, 30 if rank < 3 else 10), s - 2 * p)
        for s, p in zip(span, padding, strict=True)
    ]
    convolve: Callable[..., Tensor] = getattr(F, f"conv{rank}d")
    forward_and_backward(
        guard,
        lambda x, w, b: convolve(x, w, b, stride, padding, dilation, groups),
        [
            torch.randn(r.randint(1, 4), groups * inner, *extents).to(dtype),
            torch.randn(groups * outer, inner, *window).to(dtype),
            torch.randn(groups * outer).to(dtype),
        ],
    )


def pooling(r: random.Random, guard: Guarded, dtype: torch.dtype) -> None:
    rank = r.choice([1, 2, 2, 2, 3])
    high = 9 if rank < 3 else 4
    window = [r.randint(1, high) for _ in range(rank)]
    stride = [r.choice([1, 2, 3, k]) for k in window]
    padding = [r.randint(0, k // 2) for k in window]
    if r.random() < 0.2:
        window = stride = [r.choice([4, 8])] * rank
        padding = [0] * rank
    extents = [max(r.randint(1, 70 if rank < 3 else 14), k) for k in window]
    sizes = [r.randint(1, 8) for _ in range(rank)]
    kind = r.choice(["max", "avg", "adaptive_max", "adaptive_avg"])
    pool: Callable[..., Tensor] = getattr(F, f"{kind}_pool{rank}d")
    arguments: Any = (sizes,) if "adaptive" in kind else (window, stride, padding)
    channels = r.choice([1, 2, 3, 5, 8, 16, 17, 33, 64])
    x = torch.randn(r.randint(1, 4), channels, *extents).to(dtype)
    forward_and_backward(guard, lambda x: pool(x, *arguments), [x])


def recurrence(r: random.Random, guard: Guarded, dtype: torch.dtype) -> None:
    hidden = r.choice([1, 3, 5, 16, 17, 32, 33, 64, 70])
    size = r.randint(1, 50)
    options: dict[str, Any] = {"bidirectional": r.random() < 0.4}
    layer = r.choice([weft.nn.LSTM, weft.nn.GRU, weft.nn.RNN])
    if layer is weft.nn.LSTM and hidden > 1 and r.random() < 0.3:
        options["proj_size"] = hidden // 2
    module = layer(size, hidden, r.randint(1, 2), **options).to(dtype)
    for parameter in module.parameters():
        parameter.data = guard(parameter.data)
    x = torch.randn(r.randint(1, 6), r.choice([1, 2, 3, 5, 13, 14, 30]), size).to(dtype)
    weights = list(module.parameters())
    guarded = guard(x).requires_grad_()
    with torch.no_grad():
        module(guarded)
    out = module(guarded)[0]
    torch.autograd.grad(out, [guarded, *weights], guard(torch.ones_like(out)))


def cells(r: random.Random, guard: Guarded, dtype: torch.dtype) -> None:
    batch = r.choice([1, 2, 3, 5, 12, 13, 30, 70])
    inputs, hidden = (r.choice([1, 3, 5, 16, 17, 33, 64, 70, 131, 257, 300]) for _ in range(2))
    cell, states, gates = r.choice([(lstm_cell, 2, 4), (F.gru_cell, 1, 3), (F.rnn_cell, 1, 1)])
    sizes = [(batch, inputs), *[(batch, hidden)] * states]
    sizes += [(gates * hidden, inputs), (gates * hidden, hidden), *[(gates * hidden,)] * 2]
    forward_and_backward(guard, cell, [torch.randn(size).to(dtype) for size in sizes])


def lstm_cell(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Tensor:
    return torch.cat(F.lstm_cell(x, (h, c), *weights))


def read_too_far(r: random.Random, guard: Guarded, dtype: torch.dtype) -> None:
    """What every other family must never do."""
    tensor = guard(torch.zeros(r.randint(1, 5000), dtype=dtype))
    end = tensor.data_ptr() + (-1 if guard.at_front else tensor.nbytes)
    ctypes.string_at(end, 1)


FAMILIES = {f.__name__: f for f in (convolution, pooling, recurrence, cells, read_too_far)}


def main(family: str, seed: int, count: int) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(seed)
    r = random.Random(seed)
    targets = _C.available_cpu_targets()
    for number in range(count):
        target = targets[number % len(targets)]
        guard = Guarded(at_front=r.random() < 0.3, channels_last=r.random() < 0.5)
        with cpu_target(target):
            FAMILIES[family](r, guard, r.choice(DTYPES))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
