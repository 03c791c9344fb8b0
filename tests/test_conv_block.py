"""The convolution-detector-pooling layer against the three layers in sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import weft
from harness import DTYPES, check_against_native, check_deterministic, check_gradients
from weft.nn.conv_block import DETECTORS, POOLINGS

RANKS = (1, 2, 3)
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def detect(x: Tensor, detector: str | None) -> Tensor:
    if detector == "leaky_relu":
        return F.leaky_relu(x, 0.2)
    return getattr(torch, detector)(x) if detector else x


def sequence(block: Any, functions: Any) -> Any:
    """The block's stages in `functions`, one by one."""
    rank = len(block.kernel_size)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        convolution = getattr(functions, f"conv{rank}d")
        y = convolution(x, weight, bias, block.stride, block.padding, groups=block.groups)
        y = detect(y, block.detector)
        if block.pooling is None:
            return y
        pooling = getattr(functions, f"{block.pooling}_pool{rank}d")
        arguments = (block.pool_size, block.pool_stride, block.pool_padding)
        if functions is F and (block.pooling, rank) == ("avg", 3):  # torch has no half types here
            return pooling(y.double() if y.dtype == torch.float64 else y.float(), *arguments).to(y)
        return pooling(y, *arguments)

    return run


def make(rank: int, device: torch.device, dtype: torch.dtype, **options: Any) -> Any:
    kind = getattr(weft.nn, f"ConvBlock{rank}d")
    window = {"kernel_size": 3, "padding": 1, "groups": 2}
    return kind(4, 6, **(window | options), negative_slope=0.2, device=device, dtype=dtype)


def whole(block: torch.nn.Module) -> Any:
    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(block, {"weight": weight, "bias": bias}, (x,))

    return run


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("rank", RANKS)
def test_equals_the_sequence(rank: int, detector: str | None, device: torch.device) -> None:
    for dtype in DTYPES:
        for pooling in POOLINGS:
            block = make(rank, device, dtype, detector=detector, pooling=pooling)
            x = torch.randn(2, 4, *(3, 4, 7)[-rank:], device=device, dtype=dtype)
            if rank > 1 and pooling == "max":
                x = x.to(memory_format=LAST[rank])
            inputs = (x.requires_grad_(), block.weight, block.bias)
            # In half types a sum may round to zero, where the slope of relu jumps.
            if detector != "relu" or dtype in (torch.float32, torch.float64):
                check_against_native(whole(block), sequence(block, F), *inputs)
            if detector in (None, "relu", "leaky_relu"):
                expected = sequence(block, weft.functional)(*inputs)
                assert torch.equal(block(x), expected)


def test_every_kernel_activates(device: torch.device) -> None:
    """Planes, rows, pixels, depthwise pixels, transposed copies; unbatched."""
    for c, k, groups, last in (
        (3, 4, 1, 0),
        (4, 4, 4, 0),
        (4, 8, 1, 1),
        (6, 6, 6, 1),
        (24, 24, 1, 0),
    ):
        block = weft.nn.ConvBlock2d(c, k, 3, padding=1, groups=groups, device=device)
        x = torch.randn(2, c, 5, 9, device=device)
        x = x.to(memory_format=torch.channels_last) if last else x
        assert torch.equal(block(x), sequence(block, weft.functional)(x, block.weight, block.bias))
        torch.testing.assert_close(block(x[0]), block(x)[0])


def test_nan_and_infinity_pass(device: torch.device) -> None:
    block = weft.nn.ConvBlock1d(1, 1, 1, bias=False, device=device)
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, -1.0, 2.0]], device=device)
    with torch.no_grad():
        block.weight.fill_(1)
        expected = torch.relu(x)
        torch.testing.assert_close(block(x), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("detector", [d for d in DETECTORS if d])
def test_gradients_of_both_orders(detector: str, device: torch.device) -> None:
    double: dict[str, Any] = {"dtype": torch.float64, "device": device}
    block = weft.nn.ConvBlock1d(1, 2, 2, detector=detector, pooling="avg", **double)
    x = torch.randn(1, 1, 4, **double, requires_grad=True)
    check_gradients(whole(block), x, block.weight, block.bias)


def test_bits_compile_opcheck_and_transforms(device: torch.device) -> None:
    block = make(2, device, torch.float32, detector="tanh", pooling="max")
    x = torch.randn(3, 4, 6, 6, device=device, requires_grad=True)

    def run(module: Any = block) -> list[Tensor]:
        output = module(x)
        return [output, *torch.autograd.grad(output.square().sum(), (x, *block.parameters()))]

    check_deterministic(run)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run())
    window = ([1, 1], [1, 1], [1, 1], 2)
    tensors = (x.detach(), block.weight.detach(), block.bias.detach())
    torch.library.opcheck(
        torch.ops.weft.conv_activated.default, (*tensors, "leaky_relu", 0.1, *window)
    )

    def loss(weight: Tensor, bias: Tensor, sample: Tensor) -> Tensor:
        return whole(block)(sample, weight, bias).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, None, 0))
    gradients = per_sample(block.weight, block.bias, x.detach())
    total = torch.autograd.grad(loss(block.weight, block.bias, x), (block.weight, block.bias))
    for g, t in zip(gradients, total, strict=True):
        torch.testing.assert_close(g.sum(0), t)
    with torch.autocast(device.type, torch.bfloat16):
        assert block(x).dtype == torch.bfloat16


def test_is_a_convolution() -> None:
    block = weft.nn.ConvBlock2d(2, 3, 3, detector="leaky_relu", pooling="max", pool_padding=1)
    assert isinstance(block, torch.nn.Conv2d)
    assert block.state_dict().keys() == torch.nn.Conv2d(2, 3, 3).state_dict().keys()
    assert "detector=leaky_relu, negative_slope=0.01, pooling=max, pool_size=2" in repr(block)
    assert type(weft.convert(block)) is weft.nn.ConvBlock2d


def test_errors() -> None:
    with pytest.raises(ValueError, match="ConvBlock1d: expected detector to be one of"):
        weft.nn.ConvBlock1d(1, 1, 1, detector="gelu")
    with pytest.raises(ValueError, match="expected pooling to be one of"):
        weft.nn.ConvBlock1d(1, 1, 1, pooling="min")
    with pytest.raises(ValueError, match="expected negative_slope to be at least 0, got -1"):
        weft.nn.ConvBlock1d(1, 1, 1, negative_slope=-1)
    x, w = torch.ones(1, 1, 2), torch.ones(1, 1, 1)
    window = ([1], [0], [1], 1)
    with pytest.raises(ValueError, match="expected activation to be one of none, relu"):
        torch.ops.weft.conv_activated(x, w, None, "gelu", 0, *window)
    with pytest.raises(ValueError, match="expected a slope of at least 0, got -1"):
        torch.ops.weft.conv_activated(x, w, None, "leaky_relu", -1, *window)
