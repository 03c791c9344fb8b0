"""Convolution against PyTorch and float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import weft
import weft.functional as W
import weft.testing
from harness import (
    DTYPES,
    check_against_native,
    check_deterministic,
    check_error_inputs,
    check_gradients,
    grid,
    module_info,
    op_samples,
    sliced,
)
from weft import _C

LAYOUTS = [torch.contiguous_format, torch.channels_last]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Input size, weight size, window: a plain one, one with everything, a depthwise and a grouped one.
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ((2, 3, 6, 7), (4, 3, 3, 2), {}),
    "all": (
        (2, 4, 9, 8),
        (6, 2, 3, 2),
        {"stride": (2, 3), "padding": (2, 1), "dilation": (1, 2), "groups": 2},
    ),
    "depthwise": ((2, 5, 6, 6), (5, 1, 3, 3), {"padding": 1, "groups": 5}),
    "same": ((1, 2, 5, 6), (3, 2, 2, 4), {"padding": "same"}),
    "strided": ((2, 2, 9, 9), (3, 2, 3, 3), {"stride": 2, "padding": 1}),
}
cases = pytest.mark.parametrize("case", CASES)


def operands(
    case: str,
    device: torch.device,
    dtype: torch.dtype = torch.float64,
    layout: torch.memory_format = torch.contiguous_format,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Input, weight and bias that require gradients, and the window."""
    input_size, weight_size, window = CASES[case]
    input = torch.randn(input_size, dtype=dtype, device=device).to(memory_format=layout)
    weight = torch.randn(weight_size, dtype=dtype, device=device)
    bias = torch.randn(weight_size[0], dtype=dtype, device=device)
    return input.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), window


# ---- values ------------------------------------------------------------------------------------


@dtypes
def test_op_db_samples(dtype: torch.dtype, device: torch.device) -> None:
    for sample in op_samples("nn.functional.conv2d", device, dtype, grad=True):
        check_against_native(W.conv2d, F.conv2d, sample.input, *sample.args, **sample.kwargs)


@cases
@layouts
@dtypes
def test_layouts_and_windows(
    case: str, layout: torch.memory_format, dtype: torch.dtype, device: torch.device
) -> None:
    input, weight, bias, window = operands(case, device, dtype, layout)
    check_against_native(W.conv2d, F.conv2d, input, weight, bias, **window)
    expected = F.conv2d(input, weight, bias, **window)
    assert W.conv2d(input, weight, bias, **window).stride() == expected.stride()


def integer_tensor(size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randint(-3, 4, size, generator=generator).to(dtype).requires_grad_()


def check_exact(
    input: Tensor, weight: Tensor, bias: Tensor | None, generator: torch.Generator, **window: Any
) -> None:
    """Values and gradients of small integers, whose sums are exact in every dtype, bit for bit."""
    inputs = [t for t in (input, weight, bias) if t is not None]
    actual = W.conv2d(input, weight, bias, **window)
    doubles = [
        None if t is None else t.detach().double().requires_grad_() for t in (input, weight, bias)
    ]
    expected = F.conv2d(*doubles, **window)
    assert torch.equal(actual, expected.to(actual.dtype))
    seed = torch.randint(-2, 3, actual.shape, generator=generator).to(actual.dtype)
    gradients = torch.autograd.grad(actual, inputs, seed)
    exact = torch.autograd.grad(expected, [t for t in doubles if t is not None], seed.double())
    for a, e in zip(gradients, exact, strict=True):
        assert torch.equal(a, e.to(a.dtype))


@st.composite
def problems(draw: st.DrawFn, channels: list[int], widths: list[int]) -> dict[str, Any]:
    axis = st.tuples
    return {
        "batch": draw(st.integers(0, 3)),
        "groups": draw(st.sampled_from([1, 1, 2, 5])),
        "c": draw(st.sampled_from(channels)),
        "k": draw(st.sampled_from(channels)),
        "extent": (draw(st.integers(1, 9)), draw(st.sampled_from(widths))),
        "kernel": draw(axis(st.integers(1, 4), st.integers(1, 5))),
        "stride": draw(axis(st.integers(1, 3), st.integers(1, 3))),
        "padding": draw(axis(st.integers(0, 4), st.integers(0, 4))),
        "dilation": draw(axis(st.integers(1, 3), st.integers(1, 3))),
        "bias": draw(st.booleans()),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "seed": draw(st.integers(0, 2**31)),
    }


def check_problem(problem: dict[str, Any]) -> None:
    extents = zip(
        *(problem[name] for name in ("extent", "padding", "dilation", "kernel")), strict=True
    )
    assume(all(size + 2 * pad > dilation * (kernel - 1) for size, pad, dilation, kernel in extents))
    generator = torch.Generator().manual_seed(problem["seed"])
    groups, c, k = problem["groups"], problem["c"], problem["k"]
    input = integer_tensor(
        (problem["batch"], groups * c, *problem["extent"]), problem["dtype"], generator
    )
    input = input.detach().to(memory_format=problem["layout"]).requires_grad_()
    weight = integer_tensor((groups * k, c, *problem["kernel"]), problem["dtype"], generator)
    bias = integer_tensor((groups * k,), problem["dtype"], generator) if problem["bias"] else None
    window = {name: problem[name] for name in ("stride", "padding", "dilation", "groups")}
    check_exact(input, weight, bias, generator, **window)


# Widths around the vectors' and tiles' edges; channels around theirs.
@pytest.mark.parametrize("target", _C.available_cpu_targets())
def test_random_problems_are_exact_on_every_cpu_target(target: str) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(problems([1, 2, 6, 8, 13, 17, 40], [1, 2, 5, 15, 16, 17, 33, 70]))
    def check(problem: dict[str, Any]) -> None:
        with weft.testing.cpu_target(target):
            check_problem(problem)

    check()


def test_random_problems_are_exact(backend: str) -> None:
    @settings(
        max_examples=15,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(problems([1, 2, 3], [1, 2, 5, 9]))
    def check(problem: dict[str, Any]) -> None:
        check_problem(problem)

    check()


def test_the_lectures_worked_filter(device: torch.device) -> None:
    image = torch.zeros(1, 1, 6, 6, device=device)
    image[..., :3] = 5
    kernel = torch.tensor([[1.0, 0.0, -1.0]] * 3, device=device).reshape(1, 1, 3, 3)
    row = torch.tensor([0.0, 15.0, 15.0, 0.0], device=device)
    assert torch.equal(W.conv2d(image, kernel), row.expand(1, 1, 4, 4))


def test_a_band_of_rows_at_a_time() -> None:
    """Maps too large for one pass over scratch; wide enough for every tile."""
    generator = torch.Generator().manual_seed(1)
    for layout, stride, groups in itertools.product(LAYOUTS, (1, 2), (1, 24)):
        input = integer_tensor((2, 24, 90, 75), torch.float32, generator)
        input = input.detach().to(memory_format=layout).requires_grad_()
        weight = integer_tensor((24, 24 // groups, 3, 3), torch.float32, generator)
        check_exact(input, weight, None, generator, stride=stride, padding=1, groups=groups)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_depthwise_map_narrower_than_its_stride(layout: torch.memory_format) -> None:
    """The input gradient has fewer columns than phases, and the first phase none of them."""
    generator = torch.Generator().manual_seed(4)
    input = integer_tensor((2, 17, 5, 1), torch.float32, generator)
    input = input.detach().to(memory_format=layout).requires_grad_()
    weight = integer_tensor((17, 1, 3, 3), torch.float32, generator)
    check_exact(input, weight, None, generator, stride=(1, 3), padding=1, groups=17)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_channels_of_wide_windows(
    dtype: torch.dtype, layout: torch.memory_format, stride: int
) -> None:
    """A first layer, whose weight gradient takes a row of the window as one run of channels."""
    generator = torch.Generator().manual_seed(5)
    input = integer_tensor((3, 3, 19, 21), dtype, generator)
    input = input.detach().to(memory_format=layout).requires_grad_()
    weight = integer_tensor((20, 3, 5, 7), dtype, generator)
    check_exact(input, weight, None, generator, stride=stride, padding=3)


# Input, weight, window of blocks of pixels that lose some to padding, of sums in several parts, of
# pixels near and far apart, of groups that a vector would be mostly empty for.
BLOCKS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "padded": ((3, 72, 15, 14), (80, 72, 3, 3), {"padding": 1}),
    "strided": ((2, 130, 11, 12), (36, 130, 3, 2), {"padding": 1, "stride": 2}),
    "pointwise": ((3, 150, 13, 17), (70, 150, 1, 1), {}),
    "few": ((3, 32, 30, 31), (24, 32, 1, 1), {}),
    "dilated": ((1, 20, 12, 40), (33, 20, 3, 3), {"padding": 3, "dilation": 3}),
    "groups": ((2, 40, 14, 13), (80, 5, 3, 3), {"padding": 1, "groups": 8}),
    "three_phases": ((2, 3, 31, 110), (32, 3, 3, 3), {"padding": 1, "stride": 3}),
    "four_phases": ((2, 2, 21, 141), (40, 2, 4, 4), {"padding": (0, 1), "stride": 4}),
    "few_products": ((1, 3, 23, 40), (50, 3, 2, 3), {"padding": 1}),
    "multiplier": ((2, 24, 9, 14), (48, 1, 3, 3), {"padding": 1, "stride": 2, "groups": 24}),
}


@pytest.mark.parametrize("case", BLOCKS)
@pytest.mark.parametrize("target", _C.available_cpu_targets())
def test_blocks_of_pixels_are_exact(target: str, case: str) -> None:
    generator = torch.Generator().manual_seed(6)
    input_size, weight_size, window = BLOCKS[case]
    for layout, dtype in itertools.product(LAYOUTS, DTYPES):
        input = integer_tensor(input_size, dtype, generator)
        input = input.detach().to(memory_format=layout).requires_grad_()
        weight = integer_tensor(weight_size, dtype, generator)
        bias = integer_tensor(weight_size[:1], dtype, generator)
        with weft.testing.cpu_target(target):
            check_exact(input, weight, bias, generator, **window)


@pytest.mark.parametrize(
    ("input_size", "weight_size", "stride"),
    [((1, 2, 512, 523), (9, 2, 3, 3), 1), ((1, 30, 540, 541), (30, 1, 3, 3), 2)],
    ids=["few_products", "depthwise_strided"],
)
def test_outputs_past_the_cache_are_exact(
    input_size: tuple[int, ...], weight_size: tuple[int, ...], stride: int
) -> None:
    """Maps of more than 8 MiB, whose rows begin anywhere in a line of it."""
    generator = torch.Generator().manual_seed(8)
    input = integer_tensor(input_size, torch.float32, generator)
    weight = integer_tensor(weight_size, torch.float32, generator)
    groups = input_size[1] // weight_size[1]
    y = W.conv2d(input, weight, stride=stride, groups=groups, padding=1)
    expected = F.conv2d(input, weight, stride=stride, groups=groups, padding=1)
    assert torch.equal(y, expected)
    grad = integer_tensor(tuple(y.shape), torch.float32, generator).detach()
    found, wanted = (torch.autograd.grad(t, (input, weight), grad) for t in (y, expected))
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("case", BLOCKS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_blocks_of_pixels_are_accurate(layout: torch.memory_format, case: str) -> None:
    """In float32: PyTorch's own bfloat16 gradient of the dilated one is at times not a number."""
    generator = torch.Generator().manual_seed(7)
    input_size, weight_size, window = BLOCKS[case]
    input = torch.randn(input_size, generator=generator).to(memory_format=layout).requires_grad_()
    weight = torch.randn(weight_size, generator=generator).requires_grad_()
    check_against_native(W.conv2d, F.conv2d, input, weight, **window)


def test_infinite_input_that_no_window_reads(device: torch.device) -> None:
    """A stride that leaves columns over: what they hold must not reach any gradient."""
    input = torch.randn(1, 1, 6, 6, device=device)
    input[..., 5] = torch.inf
    weight = torch.randn(1, 1, 2, 2, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(W.conv2d(input, weight, stride=3).sum(), weight)
    assert gradient.isfinite().all()


def test_sliced_and_expanded_operands(device: torch.device) -> None:
    input, weight, bias, window = operands("all", device, torch.float32)
    check_against_native(W.conv2d, F.conv2d, sliced(input), sliced(weight), sliced(bias), **window)
    shared = torch.randn(1, 4, 9, 1, device=device).expand(3, 4, 9, 8)
    one_filter = torch.randn(1, 2, 3, 2, device=device).expand(6, 2, 3, 2)
    check_against_native(W.conv2d, F.conv2d, shared, one_filter, bias.detach(), **window)
    output = W.conv2d(input, weight, bias, **window)
    expected = F.conv2d(input, weight, bias, **window)
    leaves = (input, weight, bias)
    for a, e in zip(
        torch.autograd.grad(output.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, e)


@layouts
def test_empty_batch(layout: torch.memory_format, device: torch.device) -> None:
    input = torch.randn(0, 4, 9, 8, device=device).to(memory_format=layout).requires_grad_()
    _, weight, bias, window = operands("all", device, torch.float32)
    output = W.conv2d(input, weight, bias, **window)
    assert output.shape == F.conv2d(input, weight, bias, **window).shape
    gradients = torch.autograd.grad(output.sum(), (input, weight, bias))
    assert gradients[0].shape == input.shape
    assert not gradients[1].any()
    assert not gradients[2].any()


@cases
@layouts
def test_deterministic(case: str, layout: torch.memory_format, device: torch.device) -> None:
    input, weight, bias, window = operands(case, device, torch.float32, layout)

    def run() -> list[Tensor]:
        output = W.conv2d(input, weight, bias, **window)
        return [output, *torch.autograd.grad(output.square().sum(), (input, weight, bias))]

    check_deterministic(run)


# ---- errors ------------------------------------------------------------------------------------


def test_op_db_errors(device: torch.device) -> None:
    check_error_inputs("nn.functional.conv2d", W.conv2d, device)


X = torch.randn(2, 4, 5, 5)
W4 = torch.randn(6, 4, 3, 3)
ERRORS = {
    "channels": (X, W4[:, :3], {}, "to have 3 channels, but got 4 channels"),
    "groups of outputs": (X, W4[:5, :2], {"groups": 2}, "divisible by 2 at dimension 0"),
    "groups": (X, W4, {"groups": 0}, "non-positive groups"),
    "large kernel": (X, torch.ones(6, 4, 7, 7), {}, r"Kernel size can't be greater than actual"),
    "dilated kernel": (X, W4, {"dilation": 3}, r"Kernel size can't be greater than actual"),
    "empty kernel": (X, W4[:, :, :0], {}, "kernel size should be greater than zero"),
    "stride": (X, W4, {"stride": 0}, "non-positive stride"),
    "dilation": (X, W4, {"dilation": 0}, "dilation should be greater than zero"),
    "padding": (X, W4, {"padding": -1}, "negative padding"),
    "huge stride": (X, W4, {"stride": 2**40}, "integer out of range"),
    "same and stride": (X, W4, {"padding": "same", "stride": 2}, "padding='same' is not supported"),
    "padding string": (X, W4, {"padding": "full"}, "Invalid padding string: 'full'"),
    "padding count": (X, W4, {"padding": (1, 2, 3)}, "a list of 2 values"),
    "stride count": (X, W4, {"stride": (1, 2, 3)}, "a list of 2 values"),
    "dilation count": (X, W4, {"dilation": (1, 2, 3)}, "a list of 2 values"),
    "input rank": (X[0, 0], W4, {}, r"Expected 3D \(unbatched\) or 4D \(batched\) input to conv2d"),
    "weight rank": (X, W4[0], {}, "Expected"),
    "weight dtype": (X, W4.double(), {}, r"Input type \(Float\) and weight type \(Double\)"),
    "bias dtype": (X, W4, {"bias": torch.ones(6).half()}, r"bias type \(Half\) should be the same"),
    "bias size": (X, W4, {"bias": torch.ones(5)}, "expected bias to be 1-dimensional with 6"),
    "no positions": (X[:, :, :0], W4, {"padding": 2}, "Only zero batch or zero channel inputs"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str, device: torch.device) -> None:
    input, weight, kwargs, message = ERRORS[name]
    bias = kwargs.get("bias")
    kwargs = {key: value for key, value in kwargs.items() if key != "bias"}
    with pytest.raises(RuntimeError, match=message):
        W.conv2d(
            input.to(device),
            weight.to(device),
            bias.to(device) if bias is not None else None,
            **kwargs,
        )


def test_other_dtypes_are_not_implemented(device: torch.device) -> None:
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(NotImplementedError, match="must be float32, float64"):
            W.conv2d(X.to(device, dtype), W4.to(device, dtype))


def test_backward_ops_check_their_arguments(device: torch.device) -> None:
    window = ([1, 1], [0, 0], [1, 1], 1)
    input, weight = X.to(device), W4.to(device)
    grad = torch.ones(2, 6, 3, 2, device=device)
    with pytest.raises(RuntimeError, match="grad must have the output's size"):
        torch.ops.weft.conv_dgrad(grad, weight, None, input.shape, *window)
    with pytest.raises(RuntimeError, match="grad must have the output's size"):
        torch.ops.weft.conv_wgrad(input, grad, weight.shape, *window)
    with pytest.raises(RuntimeError, match="expected grad to have 3, 4 or 5 dimensions"):
        torch.ops.weft.conv_bias_grad(grad[0, 0])


# ---- autograd ----------------------------------------------------------------------------------

SMALL: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "all": (
        (2, 2, 4, 2),
        (2, 1, 2, 2),
        {"stride": (2, 1), "padding": (1, 1), "dilation": (1, 2), "groups": 2},
    ),
    "dense": ((1, 2, 3, 2), (2, 2, 2, 3), {"padding": 1}),
    "same": ((1, 1, 3, 3), (2, 1, 2, 2), {"padding": "same"}),
}


@pytest.mark.parametrize("case", SMALL)
def test_gradients_of_both_orders(case: str, device: torch.device) -> None:
    input_size, weight_size, window = SMALL[case]
    double = {"dtype": torch.float64, "device": device, "requires_grad": True}
    inputs = [torch.randn(size, **double) for size in (input_size, weight_size, weight_size[:1])]

    check_gradients(lambda *t: W.conv2d(*t, **window), *inputs)


@layouts
def test_second_gradients_agree_with_torch(
    layout: torch.memory_format, device: torch.device
) -> None:
    input, weight, bias, window = operands("all", device, layout=layout)

    def second(function: Any) -> list[Tensor]:
        leaves = (input, weight, bias)
        output = function(*leaves, **window)
        first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    torch.testing.assert_close(second(W.conv2d), second(F.conv2d), rtol=1e-10, atol=1e-10)


def test_only_what_is_asked_for_is_saved_and_computed(device: torch.device) -> None:
    input, weight, bias, window = operands("plain", device)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        W.conv2d(input.detach(), weight, bias, **window).sum().backward()
        assert [t.shape for t in saved] == [input.shape]
        saved.clear()
        W.conv2d(input, weight.detach(), None, **window).sum().backward()
        assert [t.shape for t in saved] == [weight.shape]
        saved.clear()
        W.conv2d(input.detach(), weight.detach(), bias, **window).sum().backward()
    assert not saved
    assert input.grad is not None
    assert weight.grad is not None
    assert bias.grad is not None


# ---- torch's other systems ---------------------------------------------------------------------


@cases
@layouts
def test_opcheck(case: str, layout: torch.memory_format, device: torch.device) -> None:
    input, weight, bias, window = operands(case, device, torch.float32, layout)
    pair = {name: (v, v) if isinstance(v, int) else v for name, v in window.items()}
    padding = pair.get("padding", (0, 0))
    if padding == "same":
        padding = (0, 1, 1, 2)
    arguments = (
        list(pair.get("stride", (1, 1))),
        list(padding),
        list(pair.get("dilation", (1, 1))),
        window.get("groups", 1),
    )
    ops = torch.ops.weft
    input, weight, bias = input.detach(), weight.detach(), bias.detach()
    output = ops.conv(input, weight, bias, *arguments)
    for op, operands_of_op in (
        (ops.conv, (input, weight, bias, *arguments)),
        (ops.conv_dgrad, (output, weight, None, list(input.shape), *arguments)),
        (ops.conv_wgrad, (input, output, list(weight.shape), *arguments)),
        (ops.conv_bias_grad, (output,)),
    ):
        torch.library.opcheck(op.default, operands_of_op)


def train(model: Any, input: Tensor) -> list[Tensor]:
    output = model(input)
    return [output, *torch.autograd.grad(output.square().sum(), (input, *model.parameters()))]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler: str, device: torch.device, backend: str) -> None:
    if compiler == "inductor" and backend == "cuda-on-host":
        return  # the same graph as on cpu
    torch._dynamo.reset()
    model = torch.nn.Sequential(
        weft.nn.Conv2d(2, 4, 3, padding="same"), torch.nn.ReLU(), weft.nn.Conv2d(4, 3, 2, 2)
    ).to(device)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for batch in (2, 3):
        input = torch.randn(batch, 2, 6, 6, device=device, requires_grad=True)
        torch.testing.assert_close(train(compiled, input), train(model, input))


def test_autocast(device: torch.device) -> None:
    input, weight, bias, window = operands("plain", device, torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        output = W.conv2d(input, weight, bias, **window)
        expected = F.conv2d(input, weight, bias, **window)
        double = W.conv2d(input.double(), weight.double(), None, **window)
    assert output.dtype == expected.dtype == torch.bfloat16
    assert double.dtype == torch.float64
    torch.testing.assert_close(output, expected)
    leaves = (input, weight, bias)
    gradients = torch.autograd.grad(output.sum(), leaves)
    assert all(g.dtype == torch.float32 for g in gradients)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), leaves))


def test_func_grad_and_per_sample_gradients(device: torch.device) -> None:
    input, weight, bias, window = (
        t.detach() if isinstance(t, Tensor) else t for t in operands("all", device)
    )

    def loss(conv2d: Any, weight: Tensor, bias: Tensor, sample: Tensor) -> Tensor:
        return conv2d(sample, weight, bias, **window).square().sum()

    def transforms(conv2d: Any) -> list[Any]:
        def of(weight: Tensor, bias: Tensor, sample: Tensor) -> Tensor:
            return loss(conv2d, weight, bias, sample)

        def batch(weight: Tensor) -> Tensor:
            return torch.func.vmap(lambda sample: of(weight, bias, sample))(input).sum()

        per_sample = torch.func.vmap(torch.func.grad(of, argnums=(0, 1, 2)), (None, None, 0))
        return [
            torch.func.grad(of)(weight, bias, input),
            per_sample(weight, bias, input),
            torch.func.grad(batch)(weight),
            torch.func.vmap(lambda w: of(w, bias, input))(torch.stack([weight, 2 * weight])),
            torch.func.jacrev(lambda b: conv2d(input, weight, b, **window))(bias),
        ]

    torch.testing.assert_close(transforms(W.conv2d), transforms(F.conv2d))


# ---- module ------------------------------------------------------------------------------------


def check_module(module: torch.nn.Module, native: torch.nn.Module, input: Tensor) -> None:
    """Values and gradients of input and parameters, both modules with `native`'s parameters."""

    def function(module: torch.nn.Module) -> Any:
        return lambda input, parameters: torch.func.functional_call(module, parameters, (input,))

    parameters = dict(native.named_parameters())
    check_against_native(function(module), function(native), input, parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_module_db_inputs(dtype: torch.dtype, device: torch.device) -> None:
    info = module_info(torch.nn.Conv2d)
    for sample in info.module_inputs_func(
        info, device=device, dtype=dtype, requires_grad=True, training=True
    ):
        options = sample.constructor_input
        factory = {"device": device, "dtype": dtype}
        native = torch.nn.Conv2d(*options.args, **options.kwargs, **factory)
        module = weft.nn.Conv2d(*options.args, **options.kwargs, **factory)
        check_module(module, native, sample.forward_input.args[0])


@pytest.mark.parametrize(
    "options",
    grid(
        padding_mode=["zeros", "reflect", "replicate", "circular"],
        padding=[1, "same", "valid"],
    ),
    ids=str,
)
def test_module_padding(options: dict[str, Any], device: torch.device) -> None:
    native = torch.nn.Conv2d(2, 3, (2, 3), device=device, **options)
    module = weft.nn.Conv2d(2, 3, (2, 3), device=device, **options)
    check_module(module, native, torch.randn(2, 2, 5, 6, device=device))


def test_module_is_torchs() -> None:
    module = weft.nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, bias=False)
    native = torch.nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, bias=False)
    assert isinstance(module, torch.nn.Conv2d)
    assert module.state_dict().keys() == native.state_dict().keys()
    assert repr(module) == repr(native)


def test_convert_and_revert() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Conv2d(2, 1, 1))
    parameters = list(model.parameters())
    assert weft.convert(model) is model
    assert [type(m) for m in model] == [weft.nn.Conv2d] * 2
    weft.revert(model)
    assert [type(m) for m in model] == [torch.nn.Conv2d] * 2
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
