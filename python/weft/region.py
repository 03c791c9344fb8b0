"""Pooling over regions of a map: RoI pooling and spatial pyramids.

Boxes become regions, whole positions of the map, once; the kernels, forward and backward, work on
those. As in pooling, both modes are linear once the places are known, so the double backward of
each is its forward again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weft.autograd import Function, needs_grad
from weft.batching import mapped_first
from weft.pool import Mode, adaptive_avg_pool2d, adaptive_max_pool2d

_ops = torch.ops.weft

# ---- fake implementations ------------------------------------------------------------------------


def _empty(
    like: Tensor, size: Sequence[Any], channels_last: bool, dtype: torch.dtype | None = None
) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def _channels_last(t: Tensor) -> bool:
    return torch._prims_common.suggest_memory_format(t) == torch.channels_last


@torch.library.register_fake("weft::regions")
def _(boxes: Tensor, spatial_scale: float, input_size: Sequence[int]) -> Tensor:
    return boxes.new_empty(boxes.shape, dtype=torch.int64)


@torch.library.register_fake("weft::region_max_pool")
def _(
    input: Tensor, regions: Tensor, output_size: Sequence[int], keep_places: bool
) -> tuple[Tensor, Tensor]:
    size, last = (regions.shape[0], input.shape[1], *output_size), _channels_last(input)
    places = _empty(input, size if keep_places else (0,), last and keep_places, torch.int32)
    return _empty(input, size, last), places


@torch.library.register_fake("weft::region_max_pool_backward")
def _(grad: Tensor, places: Tensor, regions: Tensor, input_size: Any, last: bool) -> Tensor:
    return _empty(grad, input_size, last)


@torch.library.register_fake("weft::region_max_pool_pick")
def _(input: Tensor, places: Tensor, regions: Tensor) -> Tensor:
    return _empty(input, places.shape, _channels_last(places))


@torch.library.register_fake("weft::region_avg_pool")
def _(input: Tensor, regions: Tensor, output_size: Sequence[int]) -> Tensor:
    size = (regions.shape[0], input.shape[1], *output_size)
    return _empty(input, size, _channels_last(input))


@torch.library.register_fake("weft::region_avg_pool_backward")
def _(grad: Tensor, regions: Tensor, input_size: Any, last: bool) -> Tensor:
    return _empty(grad, input_size, last)


# ---- vmap ----------------------------------------------------------------------------------------


@torch.library.register_vmap("weft::regions")
def _(info: Any, in_dims: tuple, boxes: Tensor, spatial_scale: float, input_size: Any) -> Any:
    all_boxes = mapped_first(boxes, in_dims[0], info.batch_size)
    found = _ops.regions(all_boxes.flatten(0, 1), spatial_scale, input_size)
    return found.reshape(all_boxes.shape), 0


def _register_batch_rule(name: str, regions_at: int, size_at: int | None) -> None:
    """The images of all samples are one batch, and so are the regions, each of its own images."""
    op = getattr(_ops, name)

    def rule(info: Any, in_dims: tuple, *args: Any) -> Any:
        samples, folded = info.batch_size, list(args)
        for i, arg in enumerate(args):
            if isinstance(arg, Tensor):
                folded[i] = mapped_first(arg, in_dims[i], samples)
        images = folded[0].shape[1] if size_at is None else args[size_at][0]
        offset = torch.arange(samples, device=folded[0].device)[:, None] * images
        regions = folded[regions_at]
        folded[regions_at] = torch.cat([regions[..., :1] + offset[..., None], regions[..., 1:]], -1)
        folded = [t.flatten(0, 1) if isinstance(t, Tensor) else t for t in folded]
        if size_at is not None:
            folded[size_at] = [samples * images, *args[size_at][1:]]

        def unfold(output: Tensor) -> tuple[Tensor, int | None]:
            if output.dim() == 1:  # places that nobody wants
                return output, None
            return output.unflatten(0, (samples, output.shape[0] // samples)), 0

        outputs = op(*folded)
        if isinstance(outputs, Tensor):
            return unfold(outputs)
        return tuple(zip(*map(unfold, outputs), strict=True))

    torch.library.register_vmap(f"weft::{name}", rule)


_register_batch_rule("region_max_pool", 1, None)
_register_batch_rule("region_max_pool_backward", 2, 3)
_register_batch_rule("region_max_pool_pick", 2, None)
_register_batch_rule("region_avg_pool", 1, None)
_register_batch_rule("region_avg_pool_backward", 1, 2)


# ---- autograd ------------------------------------------------------------------------------------


class RegionMaxPool(Function):
    """y = max of each bin; also returns the places (int32)."""

    @staticmethod
    def compute(
        input: Tensor, regions: Tensor, output_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        return _ops.region_max_pool(input, regions, output_size, True)

    @staticmethod
    def save(ctx: Any, args: tuple, outputs: tuple[Tensor, Tensor]) -> None:
        input, regions, _ = args
        ctx.layout = input.shape, _channels_last(input)
        ctx.mark_non_differentiable(outputs[1])
        ctx.save_for_backward(outputs[1], regions)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None]:
        return RegionMaxPoolBackward.apply(grad, *ctx.saved_tensors, *ctx.layout), None, None


class RegionMaxPoolBackward(Function):
    """gx = Pᵀ gy, where P picks each bin's place."""

    @staticmethod
    def compute(
        grad: Tensor, places: Tensor, regions: Tensor, size: torch.Size, channels_last: bool
    ) -> Tensor:
        return _ops.region_max_pool_backward(grad, places, regions, size, channels_last)

    @staticmethod
    def save(ctx: Any, args: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*args[1:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return RegionMaxPoolPick.apply(grad, *ctx.saved_tensors), None, None, None, None


class RegionMaxPoolPick(Function):
    """y = P x: the values at each bin's place, 0 for empty bins."""

    @staticmethod
    def compute(input: Tensor, places: Tensor, regions: Tensor) -> Tensor:
        return _ops.region_max_pool_pick(input, places, regions)

    @staticmethod
    def save(ctx: Any, args: tuple, output: Tensor) -> None:
        input, *rest = args
        ctx.layout = input.shape, _channels_last(input)
        ctx.save_for_backward(*rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return RegionMaxPoolBackward.apply(grad, *ctx.saved_tensors, *ctx.layout), None, None


class RegionAvgPool(Function):
    """y = A x: the mean of each bin."""

    @staticmethod
    def compute(input: Tensor, regions: Tensor, output_size: tuple[int, int]) -> Tensor:
        return _ops.region_avg_pool(input, regions, output_size)

    @staticmethod
    def save(ctx: Any, args: tuple, output: Tensor) -> None:
        input, regions, _ = args
        ctx.layout = input.shape, _channels_last(input)
        ctx.save_for_backward(regions)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return RegionAvgPoolBackward.apply(grad, *ctx.saved_tensors, *ctx.layout), None, None


class RegionAvgPoolBackward(Function):
    """gx = Aᵀ gy."""

    @staticmethod
    def compute(grad: Tensor, regions: Tensor, size: torch.Size, channels_last: bool) -> Tensor:
        return _ops.region_avg_pool_backward(grad, regions, size, channels_last)

    @staticmethod
    def save(ctx: Any, args: tuple, output: Tensor) -> None:
        grad, regions, _, _ = args
        ctx.output_size = tuple(grad.shape[-2:])
        ctx.save_for_backward(regions)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (regions,) = ctx.saved_tensors
        return RegionAvgPool.apply(grad, regions, ctx.output_size), None, None, None


# ---- functional API ------------------------------------------------------------------------------

Boxes = Tensor | Sequence[Tensor]


def _box_tensor(input: Tensor, boxes: Boxes) -> Tensor:
    """`boxes` as one tensor [K, 5], each with the number of its image in front."""
    if isinstance(boxes, Tensor):
        return boxes
    if len(boxes) != input.shape[0]:
        raise RuntimeError(
            f"roi_pool: a list of boxes must have one tensor per image, "
            f"got {len(boxes)} tensors for {input.shape[0]} images"
        )
    for i, one in enumerate(boxes):
        if one.dim() != 2 or one.shape[1] != 4 or not one.is_floating_point():
            raise RuntimeError(
                f"roi_pool: boxes of an image must be floating [L, 4] (x1, y1, x2, y2), "
                f"got {one.dtype} {list(one.shape)} for image {i}"
            )
    # An image's number may not be a half type's.
    wide = [one if one.dtype == torch.float64 else one.float() for one in boxes]
    numbered = [torch.cat([one.new_full((len(one), 1), i), one], 1) for i, one in enumerate(wide)]
    return torch.cat(numbered) if numbered else input.new_empty((0, 5), dtype=torch.float32)


def _checked_mode(op: str, mode: str) -> str:
    if mode not in ("max", "mean"):
        raise ValueError(f"{op}: mode must be 'max' or 'mean', got {mode!r}")
    return mode


def _regions(input: Tensor, boxes: Boxes, spatial_scale: float) -> Tensor:
    numbered = _box_tensor(input, boxes).detach()
    if numbered.device != input.device:
        raise RuntimeError(
            "roi_pool: expected all tensors to be on the same device, but boxes are on "
            f"{numbered.device} and input is on {input.device}"
        )
    return _ops.regions(numbered, spatial_scale, input.shape)


def _pooled(input: Tensor, regions: Tensor, output_size: tuple[int, int], mode: str) -> Tensor:
    if mode == "mean":
        if needs_grad(input):
            return RegionAvgPool.apply(input, regions, output_size)
        return _ops.region_avg_pool(input, regions, output_size)
    if needs_grad(input):
        return RegionMaxPool.apply(input, regions, output_size)[0]
    return _ops.region_max_pool(input, regions, output_size, False)[0]


def roi_pool(
    input: Tensor,
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    mode: Mode = "max",
) -> Tensor:
    """Pools each box of a map to a fixed size (Girshick, Fast R-CNN, 2015, section 2.1).

    The quantisation is `torchvision.ops.roi_pool`'s. A box covers the positions
    ``round(x1·scale) … round(x2·scale)`` of the map, both included and at least one; halves are
    rounded away from zero, in the precision of the boxes. Of its extent ``e``, bin ``b`` of ``B``
    covers ``⌊b·e/B⌋ … ⌈(b+1)·e/B⌉ − 1``, clipped to the map; an empty bin gives 0.

    Differences from torchvision: ``b·e/B`` is exact, where its float32 can take in one row more;
    NaN is a maximum, as in torch's pooling, where torchvision skips it; a box far from the map is
    an error; the bits of the gradient never change.

    Args:
        input: ``[N, C, H, W]``; float32, float64, bfloat16 or float16; contiguous or channels-last,
            and the output has the same layout.
        boxes: ``[K, 5]`` of (image, x1, y1, x2, y2), or one ``[L, 4]`` of (x1, y1, x2, y2) per
            image; of any floating dtype. They have no gradient.
        output_size: bins along H and W, an int or two.
        spatial_scale: positions of the map per unit of the boxes, e.g. 1/16.
        mode: "max" or "mean" of each bin.

    Returns:
        ``[K, C, *output_size]``.

    Raises:
        RuntimeError: for boxes of another shape or dtype or on another device than `input`.
        IndexError: for a box of an image that is not in the batch.
        ValueError: for coordinates that are not finite, and for a box that lies outside the map by
            more than one position (most often, the scale is wrong).

    On a GPU the boxes are checked on the host, which waits for them.
    """
    _checked_mode("roi_pool", mode)
    sizes = tuple(output_size) if isinstance(output_size, Sequence) else (output_size,) * 2
    if len(sizes) != 2:
        raise RuntimeError(f"roi_pool: output_size must be an int or 2 of them, got {sizes}")
    return _pooled(input, _regions(input, boxes, spatial_scale), sizes, mode)


def spatial_pyramid_pool2d(
    input: Tensor,
    levels: Sequence[int] = (1, 2, 4),
    mode: Mode = "max",
    boxes: Boxes | None = None,
    spatial_scale: float = 1.0,
) -> Tensor:
    """A vector of one length from maps or regions of any size (He et al., SPP-net, 2014, sect. 2).

    Level ``l`` divides the map, or each box of it, into ``l × l`` bins, whose maxima or means are
    laid one after another, channel by channel.

    Args:
        input: ``[N, C, H, W]``.
        levels: bins along each axis, one int per level.
        mode: "max" or "mean" of each bin.
        boxes, spatial_scale: as `roi_pool`; without boxes, the whole map of each image.

    Returns:
        ``[N, C·Σ levels²]``, or ``[K, C·Σ levels²]`` for K boxes.

    Raises:
        RuntimeError, IndexError, ValueError: as `roi_pool`; ValueError also for no levels.
    """
    _checked_mode("spatial_pyramid_pool2d", mode)
    if len(levels) == 0:
        raise ValueError("spatial_pyramid_pool2d: levels must be at least one int, got none")
    if boxes is None:
        if input.dim() != 4:
            raise RuntimeError(
                "spatial_pyramid_pool2d: Expected 4D (batch mode) tensor, but got input of size "
                f"{list(input.shape)}"
            )
        whole: Any = adaptive_avg_pool2d if mode == "mean" else adaptive_max_pool2d
        pooled = [whole(input, level) for level in levels]
    else:
        regions = _regions(input, boxes, spatial_scale)
        pooled = [_pooled(input, regions, (level, level), mode) for level in levels]
    return torch.cat([one.flatten(1) for one in pooled], 1)
