"""Convolution of every rank, and transposed, against PyTorch and float64.

`test_conv.py` tests conv2d, whose kernels these share, in full; here is what differs between ranks
and for transposed convolution, and the layers.
"""

from __future__ import annotations

import re
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
    module_info,
    op_samples,
    sliced,
)
from weft import _C

RANKS = (1, 2, 3)
CONV = [f"conv{rank}d" for rank in (1, 3)]
TRANSPOSED = [f"conv_transpose{rank}d" for rank in RANKS]
LAYOUT = {4: torch.channels_last, 5: torch.channels_last_3d}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
functions = pytest.mark.parametrize("name", CONV + TRANSPOSED)

# Channels in and out, extents, window and options; those of rank r use the last r of a tuple.
CASES: dict[str, tuple[int, int, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": (3, 4, (4, 5, 7), (2, 3, 2), {}),
    "all": (
        4,
        6,
        (5, 6, 8),
        (2, 3, 2),
        {"stride": (1, 2, 3), "padding": (1, 2, 1), "dilation": (2, 1, 2), "groups": 2},
    ),
    "depthwise": (5, 5, (3, 6, 5), (3, 3, 3), {"padding": 1, "groups": 5}),
    "strided": (2, 3, (4, 7, 6), (3, 3, 3), {"stride": 2, "padding": 1}),
}
cases = pytest.mark.parametrize("case", CASES)


def operands(
    name: str,
    case: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    last: bool = False,
) -> tuple[list[Tensor], dict[str, Any]]:
    """Input, weight and bias that require gradients, and the options, of the function `name`."""
    rank = int(name[-2])
    c, k, extents, window, options = CASES[case]
    groups = options.get("groups", 1)
    transposed = "transpose" in name
    inner, outer = (k // groups, c) if transposed else (c // groups, k)
    sizes = ((2, c, *extents[-rank:]), (outer, inner, *window[-rank:]), (k,))
    tensors = [torch.randn(size, dtype=dtype, device=device) for size in sizes]
    if last and rank > 1:
        tensors[0] = tensors[0].to(memory_format=LAYOUT[rank + 2])
    options = {n: v[-rank:] if isinstance(v, tuple) else v for n, v in options.items()}
    if transposed and "stride" in options:
        stride = options["stride"]
        options["output_padding"] = 1 if stride == 2 else tuple(min(s - 1, 1) for s in stride)
    return [t.requires_grad_() for t in tensors], options


def pair(name: str) -> tuple[Any, Any]:
    return getattr(W, name), getattr(F, name)


# ---- values ------------------------------------------------------------------------------------


@dtypes
@functions
def test_op_db_samples(name: str, dtype: torch.dtype, device: torch.device) -> None:
    for sample in op_samples(f"nn.functional.{name}", device, dtype, grad=True):
        check_against_native(*pair(name), sample.input, *sample.args, **sample.kwargs)


@cases
@functions
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_windows_layouts_and_dtypes(case: str, name: str, last: bool, device: torch.device) -> None:
    for dtype in DTYPES:
        tensors, options = operands(name, case, device, dtype, last)
        check_against_native(*pair(name), *tensors, **options)
    tensors, options = operands(name, case, device, torch.float32, last)
    weft, native = pair(name)
    assert weft(*tensors, **options).stride() == native(*tensors, **options).stride()


@st.composite
def problems(draw: st.DrawFn, channels: list[int], widths: list[int]) -> dict[str, Any]:
    rank = draw(st.sampled_from(RANKS))

    def axis(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    transposed = draw(st.booleans())
    stride, dilation = axis(1, 3), axis(1, 2)
    most = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
    problem = {
        "batch": draw(st.integers(0, 2)),
        "groups": draw(st.sampled_from([1, 1, 2, 5])),
        "c": draw(st.sampled_from(channels)),
        "k": draw(st.sampled_from(channels)),
        "extent": (*axis(1, 5)[1:], draw(st.sampled_from(widths))),
        "kernel": axis(1, 4),
        "last": draw(st.booleans()) and rank > 1,
        "dtype": draw(st.sampled_from(DTYPES)),
        "bias": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
        "name": f"conv{'_transpose' if transposed else ''}{rank}d",
        "window": {"stride": stride, "padding": axis(0, 3), "dilation": dilation},
    }
    if transposed:
        extra = tuple(draw(st.integers(0, m)) for m in most)
        problem["window"]["output_padding"] = extra
    return problem


def check_problem(problem: dict[str, Any]) -> None:
    """Values and gradients of small integers, whose sums are exact in every dtype, bit for bit."""
    window, kernel = problem["window"], problem["kernel"]
    axes = list(zip(problem["extent"], kernel, *(window[n] for n in window), strict=True))
    if "transpose" in problem["name"]:
        # With no position of the output outside the padding torch says no.
        assume(all((x - 1) * s - 2 * p + d * (r - 1) + o >= 0 for x, r, s, p, d, o in axes))
        # oneDNN takes no padding beyond the window.
        assume(all(p <= d * (r - 1) for _, r, _, p, d, _ in axes))
    else:
        assume(all(x + 2 * p > d * (r - 1) for x, r, _, p, d in axes))
    generator = torch.Generator().manual_seed(problem["seed"])
    groups, c, k = problem["groups"], problem["c"], problem["k"]
    sizes = [(problem["batch"], groups * c, *problem["extent"]), (groups * k, c, *kernel)]
    if "transpose" in problem["name"]:
        sizes[1] = (groups * c, k, *kernel)
    sizes += [(groups * k,)] * problem["bias"]
    doubles = [torch.randint(-2, 3, size, generator=generator).double() for size in sizes]
    if problem["last"]:
        doubles[0] = doubles[0].to(memory_format=LAYOUT[doubles[0].dim()])
    inputs = [t.to(problem["dtype"]).requires_grad_() for t in doubles]
    doubles = [t.requires_grad_() for t in doubles]
    weft_function, native = pair(problem["name"])
    actual = weft_function(*inputs, **window, groups=groups)
    exact = native(*doubles, **window, groups=groups)
    assert torch.equal(actual, exact.to(actual.dtype))
    seed = torch.randint(-1, 2, actual.shape, generator=generator).double()
    gradients = torch.autograd.grad(actual, inputs, seed.to(actual.dtype))
    for a, e in zip(gradients, torch.autograd.grad(exact, doubles, seed), strict=True):
        assert torch.equal(a, e.to(a.dtype))


@pytest.mark.parametrize("target", _C.available_cpu_targets())
def test_random_problems_are_exact_on_every_cpu_target(target: str) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(problems([1, 1, 2, 6, 17, 33], [1, 2, 5, 16, 17, 35]))
    def check(problem: dict[str, Any]) -> None:
        with weft.testing.cpu_target(target):
            check_problem(problem)

    check()


def test_random_problems_are_exact(backend: str) -> None:
    @settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(problems([1, 2, 3], [1, 2, 5]))
    def check(problem: dict[str, Any]) -> None:
        check_problem(problem)

    check()


@functions
def test_unbatched_sliced_and_empty(name: str, device: torch.device) -> None:
    (input, weight, bias), options = operands(name, "all", device)
    weft, native = pair(name)
    check_against_native(weft, native, input[0].detach(), weight, bias, **options)
    check_against_native(weft, native, sliced(input), sliced(weight), sliced(bias), **options)
    empty = input[:0].detach().requires_grad_()
    output = weft(empty, weight, bias, **options)
    assert output.shape == native(empty, weight, bias, **options).shape
    gradients = torch.autograd.grad(output.sum(), (empty, weight, bias))
    assert gradients[0].shape == empty.shape
    assert not any(g.any() for g in gradients)


@functions
def test_deterministic(name: str, device: torch.device) -> None:
    tensors, options = operands(name, "all", device)

    def run() -> list[Tensor]:
        output = pair(name)[0](*tensors, **options)
        return [output, *torch.autograd.grad(output.square().sum(), tensors)]

    check_deterministic(run)


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONV)
def test_op_db_errors(name: str, device: torch.device) -> None:
    check_error_inputs(f"nn.functional.{name}", getattr(W, name), device)


TRANSPOSED_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "input rank": ({"input": (4, 5)}, r"Expected 3D \(unbatched\) or 4D \(batched\) input"),
    "channels": ({"input": (2, 3, 5, 5)}, "to have 4 channels, but got 3 channels instead"),
    "groups": ({"groups": 3}, "expected weight to be divisible by 3 at dimension 0"),
    "groups of none": ({"groups": 0}, "non-positive groups"),
    "bias": ({"bias": (4,)}, "expected bias to be 1-dimensional with 2 elements"),
    "output padding": ({"output_padding": 1}, "must be smaller than either stride or dilation"),
    "negative padding": ({"padding": -1}, "negative padding is not supported"),
    "negative output padding": ({"output_padding": -1}, "negative output_padding is not supported"),
    "stride": ({"stride": 0}, "non-positive stride is not supported"),
    "dilation": ({"dilation": 0}, "dilation should be greater than zero"),
    "stride count": ({"stride": (1, 2, 3)}, "expected stride to be a single integer value or a"),
    "no output": ({"padding": 4}, "Output size is too small"),
    "no input": ({"input": (2, 4, 0, 5)}, "Only zero batch or zero channel inputs are supported"),
    "huge stride": ({"stride": 2**40}, "integer out of range"),
}


@pytest.mark.parametrize("case", TRANSPOSED_ERRORS)
def test_transposed_errors(case: str, device: torch.device) -> None:
    changes, message = TRANSPOSED_ERRORS[case]
    sizes = {"input": (2, 4, 5, 5), "weight": (4, 2, 3, 3), "bias": (2,)}
    sizes |= {n: v for n, v in changes.items() if n in sizes}
    options = {n: v for n, v in changes.items() if n not in sizes}
    tensors = {n: torch.ones(size, device=device) for n, size in sizes.items()}
    with pytest.raises(RuntimeError, match=message):
        W.conv_transpose2d(**tensors, **options)


def test_transposed_dtypes(device: torch.device) -> None:
    input, weight = torch.ones(1, 2, 3, device=device), torch.ones(2, 2, 2, device=device)
    with pytest.raises(RuntimeError, match="should be the same"):
        W.conv_transpose1d(input, weight.double())
    with pytest.raises(NotImplementedError, match="must be float32, float64"):
        W.conv_transpose1d(input.int(), weight.int())


# ---- autograd and torch's other systems --------------------------------------------------------

TINY: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "conv1d": ((2, 2, 5), (2, 1, 3), {"stride": 2, "padding": 1, "groups": 2}),
    "conv3d": ((1, 1, 2, 3, 3), (2, 1, 2, 2, 2), {"padding": (0, 1, 1), "dilation": (1, 1, 2)}),
    "conv_transpose1d": ((2, 2, 3), (2, 2, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    "conv_transpose2d": (
        (1, 2, 2, 3),
        (2, 1, 2, 2),
        {"stride": (1, 2), "dilation": (3, 1), "output_padding": (2, 1), "groups": 2},
    ),
    "conv_transpose3d": ((1, 1, 2, 2, 2), (1, 1, 2, 2, 1), {"stride": (1, 2, 1), "padding": 0}),
}


def output_channels(name: str) -> int:
    _, weight_size, options = TINY[name]
    return weight_size[1] * options.get("groups", 1) if "transpose" in name else weight_size[0]


@functions
def test_gradients_of_both_orders(name: str, device: torch.device) -> None:
    input_size, weight_size, options = TINY[name]
    outputs = output_channels(name)
    double = {"dtype": torch.float64, "device": device, "requires_grad": True}
    inputs = [torch.randn(size, **double) for size in (input_size, weight_size, (outputs,))]
    check_gradients(lambda *t: getattr(W, name)(*t, **options), *inputs)


@functions
def test_opcheck(name: str, device: torch.device) -> None:
    tensors, options = operands(name, "all", device, last=True)
    input, weight, bias = (t.detach() for t in tensors)
    window = [list(options[n]) for n in ("stride", "padding", "dilation")]
    if "transpose" not in name:
        torch.library.opcheck(
            torch.ops.weft.conv.default, (input, weight, bias, *window, options["groups"])
        )
        return
    size = list(F.__dict__[name](input, weight, bias, **options).shape)
    window[1] += [p - o for p, o in zip(window[1], options["output_padding"], strict=True)]
    torch.library.opcheck(
        torch.ops.weft.conv_dgrad.default, (input, weight, bias, size, *window, options["groups"])
    )


@functions
def test_compile_and_autocast(name: str, device: torch.device) -> None:
    tensors, options = operands(name, "all", device)
    weft_function, native = pair(name)

    def run(function: Any, *tensors: Tensor) -> list[Tensor]:
        output = function(*tensors, **options)
        return [output, *torch.autograd.grad(output.square().sum(), tensors)]

    torch._dynamo.reset()
    compiled = torch.compile(weft_function, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        input = torch.randn(batch, *tensors[0].shape[1:], device=device, requires_grad=True)
        batched = (input, *tensors[1:])
        torch.testing.assert_close(run(compiled, *batched), run(weft_function, *batched))
    with torch.autocast(device.type, torch.bfloat16):
        output, expected = weft_function(*tensors, **options), native(*tensors, **options)
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected)


@functions
def test_func_transforms(name: str, device: torch.device) -> None:
    input_size, weight_size, options = TINY[name]
    outputs = output_channels(name)
    double = {"dtype": torch.float64, "device": device}
    sizes = ((2, *input_size[1:]), weight_size, (outputs,))
    input, weight, bias = (torch.randn(size, **double) for size in sizes)

    def transforms(function: Any) -> list[Any]:
        def of(weight: Tensor, bias: Tensor, sample: Tensor) -> Tensor:
            return function(sample, weight, bias, **options).square().sum()

        per_sample = torch.func.vmap(torch.func.grad(of, argnums=(0, 1, 2)), (None, None, 0))
        weights = torch.stack([weight, 2 * weight], dim=1)
        biases = torch.stack([bias, -bias])
        return [
            per_sample(weight, bias, input),
            torch.func.vmap(lambda w, b: of(w, b, input), (1, 0))(weights, biases),
            torch.func.vmap(lambda w: of(w, bias, input), 1)(weights),
            torch.func.vmap(lambda b: function(input, weight, b, **options))(biases),
            torch.func.vmap(lambda w, x: of(w, bias, x), (1, 0))(weights, input),
            torch.func.jacrev(lambda w: function(input, w, bias, **options))(weight),
            torch.func.jacrev(torch.func.grad(lambda b: of(weight, b, input)))(bias),
        ]

    torch.testing.assert_close(transforms(getattr(W, name)), transforms(getattr(F, name)))


def test_per_sample_gradients_are_one_call_of_each_kernel() -> None:
    weight = torch.randn(4, 3, 3, 3)
    input = torch.randn(5, 3, 6, 6)

    def loss(weight: Tensor, sample: Tensor) -> Tensor:
        return W.conv2d(sample.unsqueeze(0), weight).square().sum()

    with weft.testing.host_execution() as host:
        torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, input)
        assert sorted(launch.kernel for launch in host.launches) == [
            "conv_grouped_fprop",
            "conv_grouped_wgrad",
        ]


# ---- modules -----------------------------------------------------------------------------------

MODULES = [f"{kind}{rank}d" for kind in ("Conv", "ConvTranspose") for rank in RANKS]
modules = pytest.mark.parametrize("name", MODULES)


def check_module(module: torch.nn.Module, native: torch.nn.Module, *args: Any) -> None:
    def function(module: torch.nn.Module) -> Any:
        return lambda parameters, *args: torch.func.functional_call(module, parameters, args)

    parameters = dict(native.named_parameters())
    check_against_native(function(module), function(native), parameters, *args)


@modules
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_module_db_inputs(name: str, dtype: torch.dtype, device: torch.device) -> None:
    info = module_info(getattr(torch.nn, name))
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    for sample in info.module_inputs_func(info, **factory, requires_grad=True, training=True):
        options = sample.constructor_input
        native = getattr(torch.nn, name)(*options.args, **options.kwargs, **factory)
        module = getattr(weft.nn, name)(*options.args, **options.kwargs, **factory)
        assert isinstance(module, type(native))
        assert module.state_dict().keys() == native.state_dict().keys()
        assert repr(module) == repr(native)
        check_module(module, native, *sample.forward_input.args)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_modes(rank: int, mode: str, device: torch.device) -> None:
    for padding in (1, "same", "valid"):
        options = {"padding": padding, "padding_mode": mode, "device": device}
        native = getattr(torch.nn, f"Conv{rank}d")(2, 3, (2, 3, 2)[:rank], **options)
        module = getattr(weft.nn, f"Conv{rank}d")(2, 3, (2, 3, 2)[:rank], **options)
        check_module(module, native, torch.randn(2, 2, *(3, 4, 5)[-rank:], device=device))


@pytest.mark.parametrize("rank", RANKS)
def test_output_size(rank: int, device: torch.device) -> None:
    options = {"stride": 3, "padding": 1, "device": device}
    native = getattr(torch.nn, f"ConvTranspose{rank}d")(2, 3, 3, **options)
    module = getattr(weft.nn, f"ConvTranspose{rank}d")(2, 3, 3, **options)
    input = torch.randn(2, 2, *(2, 3, 2)[:rank], device=device)
    size = [4, 9, 6][:rank]
    check_module(module, native, input, size)
    check_module(module, native, input, [2, 3, *size])
    with pytest.raises(ValueError, match="requested an output size"):
        module(input, [50] * rank)
    with pytest.raises(ValueError, match="output_size must have"):
        module(input, [50] * (rank + 1))


@modules
def test_lazy_modules_become_wefts(name: str, device: torch.device) -> None:
    input = torch.randn(2, 4, *(3, 4, 5)[: int(name[-2])], device=device)
    for module in (
        getattr(weft.nn, "Lazy" + name)(6, 2, device=device),
        weft.convert(getattr(torch.nn, "Lazy" + name)(6, 2, device=device)),
    ):
        output = module(input)
        assert type(module) is getattr(weft.nn, name)
        assert module.in_channels == 4
        native = weft.revert(module)
        assert type(native) is getattr(torch.nn, name)
        torch.testing.assert_close(output, native(input))


def test_export(device: torch.device) -> None:
    model = torch.nn.Sequential(
        weft.nn.Conv2d(2, 4, 3, stride=2), weft.nn.ConvTranspose2d(4, 2, 3, stride=2)
    ).to(device)
    input = torch.randn(3, 2, 7, 7, device=device)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(model, (input,), dynamic_shapes=({**batch},))
    used = re.findall(r"weft\.(\w+)\.default", str(program.graph))
    assert used == ["conv", "conv_dgrad"]
    other = torch.randn(5, 2, 7, 7, device=device)
    torch.testing.assert_close(program.module()(other), model(other))
