"""How weft's ops run under `torch.func.vmap`: the mapped axis joins the batch.

An op without a rule of its own is called once per sample by torch, with a warning. An op whose
tensors all have the batch as their first axis needs no loop: the samples of a mapped call are one
larger batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def mapped_first(tensor: Tensor, axis: int | None, samples: int) -> Tensor:
    """`tensor` with the mapped axis in front; one that is not mapped is the same in each sample."""
    if axis is None:
        return tensor.expand(samples, *tensor.shape)
    return tensor.movedim(axis, 0)


def register_batch_rule(
    op: str, unbatched_dims: Callable[..., int], size_argument: int | None = None
) -> None:
    """Gives `op` a vmap rule that runs all samples as one batch.

    Args:
        op: e.g. "weft::max_pool". Each of its tensor arguments and outputs has the batch in front
            (or none of them has); an output of one dimension stands for one that is not wanted.
        unbatched_dims: of the op's arguments, how many dimensions an unbatched tensor has.
        size_argument: the place of an argument that is a tensor's size.
    """
    overload = getattr(torch.ops.weft, op.removeprefix("weft::"))

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        samples = info.batch_size
        places = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
        tensors = {i: mapped_first(args[i], in_dims[i], samples) for i in places}
        batched = tensors[places[0]].dim() == unbatched_dims(*args) + 2

        folded = list(args)
        for i, tensor in tensors.items():
            folded[i] = tensor.flatten(0, 1) if batched else tensor
        if size_argument is not None:
            size = args[size_argument]
            folded[size_argument] = [samples * size[0], *size[1:]] if batched else [samples, *size]

        def unfold(output: Tensor) -> tuple[Tensor, int | None]:
            if output.dim() == 1:
                return output, None
            if not batched:
                return output, 0
            return output.unflatten(0, (samples, output.shape[0] // max(samples, 1))), 0

        outputs = overload(*folded)
        if isinstance(outputs, Tensor):
            return unfold(outputs)
        values, axes = zip(*map(unfold, outputs), strict=True)
        return values, axes

    torch.library.register_vmap(op, rule)


def register_rows_rule(
    op: str, rows: Sequence[int | None], results: Sequence[int | None], wanted: bool = False
) -> None:
    """Gives `op` a vmap rule that runs all samples as more rows of one batch where that can be.

    Samples that differ in a tensor without rows (a weight), or ask for the gradient of one, which
    is a sum over rows, are run one after the other.

    Args:
        op: e.g. "weft::rnn_layer".
        rows: of each tensor argument, which come first, the axis of its rows, or None.
        results: the same of each output.
        wanted: whether the last argument tells which outputs are wanted; others have one dimension.
    """
    overload = getattr(torch.ops.weft, op.removeprefix("weft::"))

    def fold(tensor: Tensor, axis: int, samples: int, dim: int | None) -> Tensor:
        return mapped_first(tensor, dim, samples).movedim(0, axis).flatten(axis, axis + 1)

    def unfold(output: Tensor, axis: int | None, samples: int) -> tuple[Tensor, int | None]:
        if axis is None or output.dim() == 1:
            return output, None
        return output.unflatten(axis, (samples, output.shape[axis] // max(samples, 1))), axis

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        samples = info.batch_size
        apart = any(
            isinstance(dim, int) for dim, axis in zip(in_dims, rows, strict=False) if axis is None
        )
        if wanted:
            apart |= any(
                asked for asked, axis in zip(args[-1], results, strict=True) if axis is None
            )
        if apart:
            found = []
            for i in range(samples):
                chosen = (
                    arg.select(dim, i) if isinstance(dim, int) else arg
                    for arg, dim in zip(args, in_dims, strict=True)
                )
                outputs = overload(*chosen)
                found.append((outputs,) if isinstance(outputs, Tensor) else outputs)
            stacked = tuple(map(torch.stack, zip(*found, strict=True)))
            return (stacked[0], 0) if len(results) == 1 else (stacked, (0,) * len(stacked))
        folded = list(args)
        for i, axis in enumerate(rows):
            if axis is not None and args[i] is not None:
                folded[i] = fold(args[i], axis, samples, in_dims[i])
        outputs = overload(*folded)
        if isinstance(outputs, Tensor):
            return unfold(outputs, results[0], samples)
        pairs = zip(outputs, results, strict=True)
        values, axes = zip(*(unfold(*pair, samples) for pair in pairs), strict=True)
        return values, axes

    torch.library.register_vmap(op, rule)
