"""How weft's ops run under `torch.func.vmap`: the mapped axis joins the batch.

An op without a rule of its own is called once per sample by torch, with a warning. An op whose
tensors all have the batch as their first axis needs no loop: the samples of a mapped call are one
larger batch.
"""

from __future__ import annotations

from collections.abc import Callable
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
