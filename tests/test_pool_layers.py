"""The poolings that torch does not have: channels, maxout, LeNet-5's subsampling."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import weft
import weft.functional as W
from harness import check_against_native, check_deterministic, check_gradients, sliced
from pool_cases import each_dtype, each_last, in_layout
from weft import reference

each_mode = pytest.mark.parametrize("mode", ["max", "mean"])


# ---- channels ------------------------------------------------------------------------------------


@each_mode
@each_dtype
@each_last
def test_channel_pool(mode: str, dtype: torch.dtype, last: bool, device: torch.device) -> None:
    x = in_layout(torch.randn(2, 12, 5, 7, device=device).to(dtype), 2, last).requires_grad_()
    windows: tuple[dict[str, Any], ...] = (
        {"kernel_size": 1},
        {"kernel_size": 4},
        {"kernel_size": 5, "ceil_mode": True},
        {"kernel_size": 3, "stride": 2},
        {"kernel_size": 12},
    )
    for window in windows:
        op = partial(W.channel_pool, mode=mode, **window)
        check_against_native(op, partial(reference.channel_pool, mode=mode, **window), x)
        y = op(x)
        assert y.shape == (2, y.shape[1], 5, 7)
        assert in_layout(y, 2, last).stride() == y.stride()


@each_mode
def test_channels_on_any_axis(mode: str, device: torch.device) -> None:
    for shape, dim in (
        ((6,), 0),
        ((4, 6), 1),
        ((4, 6), -1),
        ((6, 3, 5), 0),
        ((2, 3, 6), -1),
        ((2, 6, 3), 1),
        ((2, 6, 3, 4, 5), 1),
        ((2, 3, 4, 5, 6), -1),
    ):
        x = torch.randn(shape, device=device)
        for variant in (x, sliced(x), x.mT if x.dim() > 1 else x):
            along = dim % x.dim()
            if variant.shape != x.shape and along >= x.dim() - 2:  # the axes changed places
                along = 2 * x.dim() - 3 - along
            y = W.channel_pool(variant, 3, mode, dim=along)
            torch.testing.assert_close(y, reference.channel_pool(variant, 3, mode, dim=along))


@each_mode
@each_last
def test_channel_pool_copies_nothing(mode: str, last: bool) -> None:
    """The kernel reads the input where it lies."""
    x = in_layout(torch.randn(2, 16, 8, 8), 2, last)
    with torch.profiler.profile() as profile:
        W.channel_pool(x, 4, mode)
    names = {event.name for event in profile.events()}
    assert {"MaxPool", "AvgPool"} & names
    assert not {"aten::copy_", "aten::clone", "aten::contiguous"} & names


@each_mode
@each_last
def test_channel_pool_gradients(mode: str, last: bool, device: torch.device) -> None:
    x = torch.randperm(2 * 6 * 2 * 2).double().reshape(2, 6, 2, 2).to(device) / 7
    x = in_layout(x, 2, last).requires_grad_()
    check_gradients(partial(W.channel_pool, kernel_size=4, mode=mode, ceil_mode=True), x)
    check_gradients(partial(W.channel_pool, kernel_size=3, mode=mode, stride=1), x)


def test_channel_pool_without_elements(device: torch.device) -> None:
    x = torch.randn(0, 6, 3, 3, device=device, requires_grad=True)
    for last in (False, True):
        y = W.channel_pool(in_layout(x, 2, last), 2)
        assert y.shape == (0, 3, 3, 3)
        y.sum().backward()


def test_channel_pool_bad_arguments(device: torch.device) -> None:
    x = torch.randn(2, 6, 4, 4, device=device)
    for kernel_size in (0, 7, -1):
        with pytest.raises(RuntimeError, match="between 1 and the 6 channels"):
            W.channel_pool(x, kernel_size)
    with pytest.raises(RuntimeError, match="stride"):
        W.channel_pool(x, 2, stride=0)
    with pytest.raises(ValueError, match="mode must be"):
        W.channel_pool(x, 2, "median")  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        W.channel_pool(x, 2, dim=4)
    with pytest.raises(NotImplementedError, match="float32, float64, bfloat16 or float16"):
        W.channel_pool(x.long(), 2)


# ---- maxout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_maxout(bias: bool, device: torch.device) -> None:
    layer = weft.nn.Maxout(5, 4, pieces=3, bias=bias, device=device)
    for shape in ((5,), (2, 5), (2, 3, 5), (0, 5)):
        x = torch.randn(shape, device=device)
        pieces = torch.nn.functional.linear(x, layer.weight, layer.bias)
        expected = pieces.unflatten(-1, (4, 3)).amax(-1)
        assert torch.equal(layer(x), expected)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"][: 1 + bias]
    assert repr(layer) == f"Maxout(in_features=5, out_features=4, pieces=3, bias={bias})"
    with pytest.raises(ValueError, match="pieces"):
        weft.nn.Maxout(5, 4, 0)


def test_maxout_of_a_convolution_learns(device: torch.device) -> None:
    """The absolute value is a maximum of two linear pieces."""
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), weft.nn.ChannelPool(2)).to(device)
    weft.convert(model)
    x = torch.randn(4, 1, 6, 6, device=device)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=40)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - x.abs()).square().mean()
        loss.backward()
        return loss

    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.5, -0.5]).reshape(2, 1, 1, 1))
    optimizer.step(closure)
    assert closure().item() < 1e-6


# ---- weighted means ------------------------------------------------------------------------------


@each_dtype
@each_last
@pytest.mark.parametrize("bias", [False, True])
def test_weighted_avg_pool(
    dtype: torch.dtype, last: bool, bias: bool, device: torch.device
) -> None:
    x = in_layout(torch.randn(2, 6, 9, 8, device=device).to(dtype), 2, last).requires_grad_()
    weight, offset = (torch.randn(6, device=device).to(dtype).requires_grad_() for _ in range(2))
    for window in ({"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}):
        arguments = (x, weight, offset if bias else None)
        check_against_native(
            W.weighted_avg_pool2d, reference.weighted_avg_pool2d, *arguments, **window
        )
        y = W.weighted_avg_pool2d(*arguments, **window)
        assert in_layout(y, 2, last).stride() == y.stride()


def test_weighted_avg_pool_layer(device: torch.device) -> None:
    layer = weft.nn.WeightedAvgPool2d(6, 2, device=device)
    x = torch.randn(2, 6, 8, 8, device=device, requires_grad=True)
    assert torch.equal(layer(x), W.avg_pool2d(x, 2))
    assert layer(x[0]).shape == (6, 4, 4)
    assert list(layer.state_dict()) == ["weight", "bias"]
    expected = "WeightedAvgPool2d(channels=6, kernel_size=2, stride=2, padding=0, bias=True)"
    assert repr(layer) == expected
    weight, bias = (torch.randn(6, device=device).double().requires_grad_() for _ in range(2))
    small = torch.randn(2, 6, 4, 3, device=device).double().requires_grad_()
    check_gradients(partial(W.weighted_avg_pool2d, kernel_size=2), small, weight, bias)


def test_autocast(device: torch.device) -> None:
    """Poolings take what the layer before gives, as torch's do; parameters follow."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3),
        weft.nn.WeightedAvgPool2d(6, 2),
        weft.nn.ChannelPool(2),
        weft.nn.SpatialPyramidPool2d((1, 2)),
        weft.nn.Maxout(15, 4),
    ).to(device)
    x = torch.randn(2, 3, 10, 10, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(x), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert model[1].weight.grad.dtype == torch.float32


def test_weighted_avg_pool_bad_arguments(device: torch.device) -> None:
    x, weight = torch.randn(2, 6, 4, 4, device=device), torch.ones(6, device=device)
    for wrong in (weight[:5], weight[:, None], weight.double()):
        with pytest.raises(RuntimeError, match=r"weight must be torch.float32 \[6\]"):
            W.weighted_avg_pool2d(x, wrong, None, 2)
        with pytest.raises(RuntimeError, match=r"bias must be torch.float32 \[6\]"):
            W.weighted_avg_pool2d(x, weight, wrong, 2)
    with pytest.raises(RuntimeError, match="too small"):
        W.weighted_avg_pool2d(x, weight, None, 5)


# ---- transforms ----------------------------------------------------------------------------------


def _weighted(x: torch.Tensor) -> torch.Tensor:
    weight = torch.linspace(-1, 1, 6, device=x.device)
    return W.weighted_avg_pool2d(x, weight, weight + 1, 2)


FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "channel_max": lambda x: W.channel_pool(x, 3),
    "channel_mean": lambda x: W.channel_pool(x, 3, "mean"),
    "weighted": _weighted,
    "pyramid": lambda x: W.spatial_pyramid_pool2d(x, (1, 2)),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


@each_function
@each_last
def test_compile(name: str, last: bool, device: torch.device) -> None:
    x = in_layout(torch.randn(2, 6, 4, 5, device=device), 2, last).requires_grad_()
    torch._dynamo.reset()
    function = FUNCTIONS[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), function(x)
    torch.testing.assert_close(y, expected)
    assert y.stride() == expected.stride()
    (a,) = torch.autograd.grad(y.sin().sum(), x)
    (e,) = torch.autograd.grad(expected.sin().sum(), x)
    torch.testing.assert_close(a, e)


@each_function
@pytest.mark.filterwarnings("error")
def test_per_sample_gradients(name: str, device: torch.device) -> None:
    x = torch.randn(3, 6, 4, 5, device=device)

    def loss(sample: torch.Tensor) -> torch.Tensor:
        return FUNCTIONS[name](sample[None]).sin().sum()

    mapped = torch.func.vmap(torch.func.grad(loss))(x)
    for i in range(3):
        torch.testing.assert_close(mapped[i], torch.func.grad(loss)(x[i]))


@each_function
def test_deterministic(name: str, device: torch.device) -> None:
    x = torch.randn(3, 6, 17, 19, device=device, requires_grad=True)

    def run() -> list[torch.Tensor]:
        y = FUNCTIONS[name](x)
        return [y, *torch.autograd.grad(y.sin().sum(), x)]

    check_deterministic(run)


def test_layers_export(device: torch.device) -> None:
    model = torch.nn.Sequential(
        weft.nn.ChannelPool(2),
        weft.nn.WeightedAvgPool2d(3, 2),
        weft.nn.SpatialPyramidPool2d((1, 2)),
        weft.nn.Maxout(15, 4),
    ).to(device)
    x = torch.randn(2, 6, 8, 8, device=device)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
