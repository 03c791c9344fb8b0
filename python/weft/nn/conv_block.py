"""The layer of a convolutional network as one unit: convolution, detector, pooling."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from weft import conv, conv_block, conv_ops
from weft.nn.conv import Conv1d, Conv2d, Conv3d, _padded

DETECTORS = (None, "relu", "leaky_relu", "tanh", "sigmoid")
POOLINGS = (None, "max", "avg")


class _ConvBlock:
    """What the blocks of every rank share; a mixin in front of a convolution layer.

    The bias and the detector are the last thing that the convolution's kernel does; the pooling
    reads what it wrote while it is in the cache. Backward undoes the detector from its output, or
    from the maxima alone.
    """

    def __init__(
        self,
        *args: Any,
        detector: str | None = "relu",
        negative_slope: float = 0.01,
        pooling: str | None = None,
        pool_size: int | tuple[int, ...] = 2,
        pool_stride: int | tuple[int, ...] | None = None,
        pool_padding: int | tuple[int, ...] = 0,
        **options: Any,
    ) -> None:
        if detector not in DETECTORS:
            raise ValueError(
                f"{type(self).__name__}: expected detector to be one of {DETECTORS}, "
                f"got {detector!r}"
            )
        if pooling not in POOLINGS:
            raise ValueError(
                f"{type(self).__name__}: expected pooling to be one of {POOLINGS}, got {pooling!r}"
            )
        if negative_slope < 0:
            raise ValueError(
                f"{type(self).__name__}: expected negative_slope to be at least 0, "
                f"got {negative_slope}"
            )
        super().__init__(*args, **options)
        self.detector = detector
        self.negative_slope = negative_slope
        self.pooling = pooling
        self.pool_size = pool_size
        self.pool_stride = pool_size if pool_stride is None else pool_stride
        self.pool_padding = pool_padding

    def extra_repr(self: Any) -> str:
        text = super().extra_repr() + f", detector={self.detector}"  # type: ignore[misc]
        if self.detector == "leaky_relu":
            text += f", negative_slope={self.negative_slope}"
        if self.pooling is not None:
            text += (
                f", pooling={self.pooling}, pool_size={self.pool_size}, "
                f"pool_stride={self.pool_stride}, pool_padding={self.pool_padding}"
            )
        return text

    def forward(self: Any, input: Tensor) -> Tensor:
        rank = len(self.kernel_size)
        input, padding = _padded(self, input)
        input, weight, bias, window = conv.conv_arguments(
            rank,
            input,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
        )
        unbatched = input.dim() == rank + 1
        if unbatched:
            input = input.unsqueeze(0)
        stages = (input, weight, bias, self.detector or "none", self.negative_slope, window)
        if self.pooling is None:
            output = conv_ops.conv_activated(*stages)
        else:
            pooling = conv_block.pooling_of(
                rank, self.pooling, self.pool_size, self.pool_stride, self.pool_padding
            )
            output = conv_block.conv_pooled(*stages, pooling)
        return output.squeeze(0) if unbatched else output


class ConvBlock1d(_ConvBlock, Conv1d):
    """pool(detector(conv(x))), with the arguments of `torch.nn.Conv1d` and those of the stages.

    Args, all by name:
        detector: "relu", "leaky_relu", "tanh", "sigmoid" or None.
        negative_slope: of "leaky_relu", at least 0.
        pooling: "max", "avg" or None.
        pool_size, pool_stride, pool_padding: the pooling's window; its stride is its size if None.

    Input ``[N, C, L]`` or ``[C, L]``. Equal to `Conv1d`, the
    activation and the pooling in sequence; parameters are named as in `Conv1d`.

    Raises:
        ValueError: for an unknown detector or pooling, or a negative slope.
    """


class ConvBlock2d(_ConvBlock, Conv2d):
    """pool(detector(conv(x))), with the arguments of `torch.nn.Conv2d` and those of the stages.

    Args, all by name:
        detector: "relu", "leaky_relu", "tanh", "sigmoid" or None.
        negative_slope: of "leaky_relu", at least 0.
        pooling: "max", "avg" or None.
        pool_size, pool_stride, pool_padding: the pooling's window; its stride is its size if None.

    Input ``[N, C, H, W]`` or ``[C, H, W]``. Equal to `Conv2d`, the
    activation and the pooling in sequence; parameters are named as in `Conv2d`.

    Raises:
        ValueError: for an unknown detector or pooling, or a negative slope.
    """


class ConvBlock3d(_ConvBlock, Conv3d):
    """pool(detector(conv(x))), with the arguments of `torch.nn.Conv3d` and those of the stages.

    Args, all by name:
        detector: "relu", "leaky_relu", "tanh", "sigmoid" or None.
        negative_slope: of "leaky_relu", at least 0.
        pooling: "max", "avg" or None.
        pool_size, pool_stride, pool_padding: the pooling's window; its stride is its size if None.

    Input ``[N, C, D, H, W]`` or ``[C, D, H, W]``. Equal to `Conv3d`, the
    activation and the pooling in sequence; parameters are named as in `Conv3d`.

    Raises:
        ValueError: for an unknown detector or pooling, or a negative slope.
    """
