"""Convolution: the functional API.

The functions of torch's names have torch's signatures and semantics. One implementation for the
convolutions and one for the transposed ones; the names fix the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from weft.autograd import autocast_arguments
from weft.conv_ops import ConvWindow, conv, conv_dgrad

_Ints = int | Sequence[int]


def _per_axis(op: str, name: str, value: _Ints, rank: int) -> tuple[int, ...]:
    if not isinstance(value, Sequence):
        return (value,) * rank
    if len(value) not in (1, rank):
        raise RuntimeError(
            f"weft: {op}: expected {name} to be a single integer value or a list of {rank} "
            f"values to match the convolution dimensions, but got {name}={list(value)}"
        )
    return tuple(value) * (rank // len(value))


def _check_ranks(op: str, rank: int, input: Tensor, weight: Tensor) -> None:
    if weight.dim() != rank + 2 or input.dim() not in (rank + 1, rank + 2):
        raise RuntimeError(
            f"weft: Expected {rank + 1}D (unbatched) or {rank + 2}D (batched) input to "
            f"{op} with a {rank + 2}D weight, but got input of size: {list(input.shape)} "
            f"and weight of size: {list(weight.shape)}. Expected {weight.dim()}-dimensional input "
            f"for {weight.dim()}-dimensional weight"
        )


def _padding_of(
    padding: str, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """The numbers of "valid" and "same"; where "same" pads an odd number, the end gets the one."""
    if padding == "valid":
        return (0,) * len(kernel_size)
    if padding != "same":
        raise RuntimeError(
            f"weft: Invalid padding string: {padding!r}; expected 'valid', 'same' or ints"
        )
    if any(s != 1 for s in stride):
        raise RuntimeError(
            "weft: padding='same' is not supported for strided convolutions, "
            f"but got stride={tuple(stride)}"
        )
    total = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=False)]
    leading = tuple(t // 2 for t in total)
    trailing = tuple(t - t // 2 for t in total)
    return leading if leading == trailing else leading + trailing


def conv_arguments(
    rank: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: _Ints,
    padding: _Ints | str,
    dilation: _Ints,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor | None, ConvWindow]:
    """The arguments of a convolution with an int for each axis, as autocast has them."""
    op = f"conv{rank}d"
    _check_ranks(op, rank, input, weight)
    stride = _per_axis(op, "stride", stride, rank)
    dilation = _per_axis(op, "dilation", dilation, rank)
    if isinstance(padding, str):
        padding = _padding_of(padding, weight.shape[2:], stride, dilation)
    else:
        padding = _per_axis(op, "padding", padding, rank)
    input, weight, bias = autocast_arguments(input, weight, bias)
    return input, weight, bias, ConvWindow(stride, padding, dilation, groups)


def _conv_nd(rank: int, *arguments: Any) -> Tensor:
    input, weight, bias, window = conv_arguments(rank, *arguments)
    if input.dim() == rank + 1:
        return conv(input.unsqueeze(0), weight, bias, window).squeeze(0)
    return conv(input, weight, bias, window)


def _check_transposed(
    op: str,
    input: Tensor,
    weight: Tensor,
    window: ConvWindow,
    output_padding: Sequence[int],
    output: Sequence[int],
) -> None:
    """Raises for what the op would call by the names of the convolution that it undoes."""
    values = {**window._asdict(), "output_padding": output_padding}
    for name in ("padding", "output_padding"):
        if any(v < 0 for v in values[name]):
            raise RuntimeError(
                f"weft: {op}: negative {name} is not supported, but got {name}={values[name]}"
            )
    for name in ("stride", "dilation"):
        if any(v <= 0 for v in values[name]):
            raise RuntimeError(
                f"weft: {op}: non-positive {name} is not supported: {name} should be greater than "
                f"zero, but got {name}={values[name]}"
            )
    if any(
        o >= max(s, d)
        for o, s, d in zip(output_padding, window.stride, window.dilation, strict=True)
    ):
        raise RuntimeError(
            f"weft: {op}: output padding must be smaller than either stride or dilation, but got "
            f"output_padding={output_padding}, stride={window.stride}, dilation={window.dilation}"
        )
    if input.shape[1] != weight.shape[0]:
        raise RuntimeError(
            f"weft: {op}: Given transposed=1, weight of size {list(weight.shape)}, expected input"
            f"{list(input.shape)} to have {weight.shape[0]} channels, but got {input.shape[1]} "
            "channels instead"
        )
    if weight.shape[1] == 0:
        raise RuntimeError(
            f"weft: {op}: expected weight to have output channels at dimension 1, but got weight "
            f"of size {list(weight.shape)}"
        )
    if any(extent <= 0 for extent in input.shape[2:]):
        raise RuntimeError(
            f"weft: {op}: Only zero batch or zero channel inputs are supported, but got input "
            f"shape: {list(input.shape)}"
        )
    if any(extent <= 0 for extent in output):
        raise RuntimeError(
            f"weft: {op}: Given input size per channel: {list(input.shape[2:])}. Calculated output "
            f"size per channel: {list(output)}. Output size is too small"
        )


def _conv_transpose_nd(
    rank: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: _Ints,
    padding: _Ints,
    output_padding: _Ints,
    groups: int,
    dilation: _Ints,
) -> Tensor:
    op = f"conv_transpose{rank}d"
    _check_ranks(op, rank, input, weight)
    if input.dim() == rank + 1:
        arguments = (bias, stride, padding, output_padding, groups, dilation)
        return _conv_transpose_nd(rank, input.unsqueeze(0), weight, *arguments).squeeze(0)
    stride = _per_axis(op, "stride", stride, rank)
    padding = _per_axis(op, "padding", padding, rank)
    output_padding = _per_axis(op, "output_padding", output_padding, rank)
    dilation = _per_axis(op, "dilation", dilation, rank)
    output = [
        (x - 1) * s - 2 * p + d * (r - 1) + o + 1
        for x, s, p, d, r, o in zip(
            input.shape[2:],
            stride,
            padding,
            dilation,
            weight.shape[2:],
            output_padding,
            strict=True,
        )
    ]
    window = ConvWindow(stride, padding, dilation, groups)
    _check_transposed(op, input, weight, window, output_padding, output)
    if any(output_padding):
        trailing = tuple(p - o for p, o in zip(padding, output_padding, strict=True))
        window = window._replace(padding=padding + trailing)
    input, weight, bias = autocast_arguments(input, weight, bias)
    size = (input.shape[0], weight.shape[1] * groups, *output)
    return conv_dgrad(input, weight, bias, size, window)


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Ints = 1,
    padding: _Ints | str = 0,
    dilation: _Ints = 1,
    groups: int = 1,
) -> Tensor:
    """1-d cross-correlation.

    ``y[n,k,l] = b[k] + Σ_{c,r} x[n, c, l·stride − padding + r·dilation] w[k,c,r]``

    Args as `torch.nn.functional.conv1d`. G groups of C input and K output channels:
        input: ``[N, G·C, L]`` or ``[G·C, L]``; float32, float64, bfloat16 or float16.
        weight: ``[G·K, C, R]``, of the input's dtype.
        bias: ``[G·K]`` or None.
        padding: zeros at both ends of each axis, or "valid" (none), or "same" (stride 1 only).

    The output is ``[N, G·K, L']``. Half types accumulate in
    float32. Under autocast the arguments are cast to its dtype.

    Raises:
        RuntimeError: for sizes, groups, dtypes or windows that do not fit, as torch.
        NotImplementedError: for other dtypes.
    """
    return _conv_nd(1, input, weight, bias, stride, padding, dilation, groups)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Ints = 1,
    padding: _Ints | str = 0,
    dilation: _Ints = 1,
    groups: int = 1,
) -> Tensor:
    """2-d cross-correlation.

    ``y[n,k,h,w] = b[k] + Σ_{c,r,s} x[n, c, h·stride − padding + r·dilation, …] w[k,c,r,s]``

    Args as `torch.nn.functional.conv2d`. G groups of C input and K output channels:
        input: ``[N, G·C, H, W]`` or ``[G·C, H, W]``; float32, float64, bfloat16 or float16.
        weight: ``[G·K, C, R, S]``, of the input's dtype.
        bias: ``[G·K]`` or None.
        padding: zeros at both ends of each axis, or "valid" (none), or "same" (stride 1 only).

    The output ``[N, G·K, H', W']`` is channels-last if input or weight is. Half types
    accumulate in float32. Under autocast the arguments are cast to its dtype.

    Raises:
        RuntimeError: for sizes, groups, dtypes or windows that do not fit, as torch.
        NotImplementedError: for other dtypes.
    """
    return _conv_nd(2, input, weight, bias, stride, padding, dilation, groups)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Ints = 1,
    padding: _Ints | str = 0,
    dilation: _Ints = 1,
    groups: int = 1,
) -> Tensor:
    """3-d cross-correlation.

    ``y[n,k,d,h,w] = b[k] + Σ_{c,t,r,s} x[n, c, d·stride − padding + t·dilation, …] w[k,c,t,r,s]``

    Args as `torch.nn.functional.conv3d`. G groups of C input and K output channels:
        input: ``[N, G·C, D, H, W]`` or ``[G·C, D, H, W]``; float32, float64, bfloat16 or float16.
        weight: ``[G·K, C, T, R, S]``, of the input's dtype.
        bias: ``[G·K]`` or None.
        padding: zeros at both ends of each axis, or "valid" (none), or "same" (stride 1 only).

    The output ``[N, G·K, D', H', W']`` is channels-last if input or weight is. Half types
    accumulate in float32. Under autocast the arguments are cast to its dtype.

    Raises:
        RuntimeError: for sizes, groups, dtypes or windows that do not fit, as torch.
        NotImplementedError: for other dtypes.
    """
    return _conv_nd(3, input, weight, bias, stride, padding, dilation, groups)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Ints = 1,
    padding: _Ints = 0,
    output_padding: _Ints = 0,
    groups: int = 1,
    dilation: _Ints = 1,
) -> Tensor:
    """Transposed 1-d convolution: the input gradient of `conv1d`, as a layer of its own.

    Every input adds itself times ``w`` to the outputs at ``position·stride − padding +
    place·dilation``.

    Args as `torch.nn.functional.conv_transpose1d`. G groups of K input and C output channels:
        input: ``[N, G·K, L]`` or ``[G·K, L]``; float32, float64, bfloat16 or float16.
        weight: ``[G·K, C, R]``, of the input's dtype.
        bias: ``[G·C]`` or None.
        output_padding: positions added at the end of each axis, fewer than stride or dilation.

    The output is ``[N, G·C, L']``, where
    ``L' = (L − 1)·stride − 2·padding + dilation·(R − 1) + output_padding + 1``.
    Half types accumulate in float32. Under autocast the arguments are cast to its dtype.

    Raises:
        RuntimeError: for sizes, groups, dtypes or windows that do not fit, as torch.
        NotImplementedError: for other dtypes.
    """
    return _conv_transpose_nd(
        1, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Ints = 1,
    padding: _Ints = 0,
    output_padding: _Ints = 0,
    groups: int = 1,
    dilation: _Ints = 1,
) -> Tensor:
    """Transposed 2-d convolution: the input gradient of `conv2d`, as a layer of its own.

    Every input adds itself times ``w`` to the outputs at ``position·stride − padding +
    place·dilation``.

    Args as `torch.nn.functional.conv_transpose2d`. G groups of K input and C output channels:
        input: ``[N, G·K, H, W]`` or ``[G·K, H, W]``; float32, float64, bfloat16 or float16.
        weight: ``[G·K, C, R, S]``, of the input's dtype.
        bias: ``[G·C]`` or None.
        output_padding: positions added at the end of each axis, fewer than stride or dilation.

    The output is ``[N, G·C, H', W']``, channels-last if input or weight is, where
    ``H' = (H − 1)·stride − 2·padding + dilation·(R − 1) + output_padding + 1``.
    Half types accumulate in float32. Under autocast the arguments are cast to its dtype.

    Raises:
        RuntimeError: for sizes, groups, dtypes or windows that do not fit, as torch.
        NotImplementedError: for other dtypes.
    """
    return _conv_transpose_nd(
        2, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Ints = 1,
    padding: _Ints = 0,
    output_padding: _Ints = 0,
    groups: int = 1,
    dilation: _Ints = 1,
) -> Tensor:
    """Transposed 3-d convolution: the input gradient of `conv3d`, as a layer of its own.

    Every input adds itself times ``w`` to the outputs at ``position·stride − padding +
    place·dilation``.

    Args as `torch.nn.functional.conv_transpose3d`. G groups of K input and C output channels:
        input: ``[N, G·K, D, H, W]`` or ``[G·K, D, H, W]``; float32, float64, bfloat16 or float16.
        weight: ``[G·K, C, T, R, S]``, of the input's dtype.
        bias: ``[G·C]`` or None.
        output_padding: positions added at the end of each axis, fewer than stride or dilation.

    The output is ``[N, G·C, D', H', W']``, channels-last if input or weight is, where
    ``D' = (D − 1)·stride − 2·padding + dilation·(T − 1) + output_padding + 1``.
    Half types accumulate in float32. Under autocast the arguments are cast to its dtype.

    Raises:
        RuntimeError: for sizes, groups, dtypes or windows that do not fit, as torch.
        NotImplementedError: for other dtypes.
    """
    return _conv_transpose_nd(
        3, input, weight, bias, stride, padding, output_padding, groups, dilation
    )
