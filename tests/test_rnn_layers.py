"""Recurrent layers over whole sequences against PyTorch and float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import weft
import weft.testing
from harness import (
    DTYPES,
    check_against_native,
    check_deterministic,
    check_gradients,
    grid,
    module_info,
    sliced,
)
from weft import _C
from weft.rnn_layer import GATES, rnn_layer

CELLS = ["lstm", "gru", "rnn_tanh", "rnn_relu"]
NATIVE = {
    "lstm": torch.nn.LSTM,
    "gru": torch.nn.GRU,
    "rnn_tanh": torch.nn.RNN,
    "rnn_relu": torch.nn.RNN,
}


def native_layer(cell: str, *sizes: int, **options: Any) -> Any:
    if cell == "rnn_relu":
        options["nonlinearity"] = "relu"
    return NATIVE[cell](*sizes, **options)


def problem(
    cell: str,
    size: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    bias: bool = True,
    grad: bool = True,
) -> list[Tensor]:
    """input [T, B, I], h0, (c0,) w_ih, w_hh (, b_ih, b_hh); size is (T, B, I, H)."""
    steps, batch, inputs, hidden = size
    rows = GATES[cell] * hidden
    sizes = [(steps, batch, inputs)] + (2 if cell == "lstm" else 1) * [(batch, hidden)]
    tensors = [torch.randn(s, dtype=dtype, device=device) for s in sizes]
    parameters = [(rows, inputs), (rows, hidden)] + (2 if bias else 0) * [(rows,)]
    for s in parameters:
        tensors.append(torch.randn(s, dtype=dtype, device=device) * hidden**-0.5)
    return [t.requires_grad_(grad) for t in tensors]


def flat(
    cell: str, lengths: Tensor | None = None, reverse: bool = False
) -> Callable[..., tuple[Tensor, ...]]:
    """The layer as a function of tensors alone."""
    states = 2 if cell == "lstm" else 1

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        state, weights = rest[:states], rest[states:]
        output, final = rnn_layer(cell, x, state, *weights, lengths=lengths, reverse=reverse)
        return output, *final

    return run


def reference(
    cell: str, lengths: Tensor | None = None, reverse: bool = False
) -> Callable[..., tuple[Tensor, ...]]:
    """The same in torch's own cells, step by step."""
    native = {
        "lstm": torch.lstm_cell,
        "gru": torch.gru_cell,
        "rnn_tanh": torch.rnn_tanh_cell,
        "rnn_relu": torch.rnn_relu_cell,
    }[cell]

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        states = 2 if cell == "lstm" else 1
        state, weights = rest[:states], rest[states:]
        outputs = [torch.zeros_like(state[0])] * len(x)
        for time in reversed(range(len(x))) if reverse else range(len(x)):
            hx = state if cell == "lstm" else state[0]
            stepped = native(x[time], hx, *weights)
            stepped = stepped if cell == "lstm" else (stepped,)
            inside = torch.ones_like(state[0], dtype=torch.bool)
            if lengths is not None:
                inside = (time < lengths)[:, None].expand_as(state[0])
            outputs[time] = torch.where(inside, stepped[0], 0)
            state = tuple(
                torch.where(inside, new, old) for new, old in zip(stepped, state, strict=True)
            )
        return torch.stack(outputs), *state

    return run


# ---- values and gradients ------------------------------------------------------------------------

SIZES = [(1, 1, 1, 1), (5, 4, 6, 12), (4, 7, 9, 33), (3, 2, 70, 17)]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_native(
    cell: str, dtype: torch.dtype, size: tuple[int, int, int, int], device: torch.device
) -> None:
    """torch's cells step by step; the reversed direction, and no bias, in turn."""
    arguments = problem(cell, size, dtype, device, bias=size[0] != 3)
    reverse = size[0] == 4
    check_against_native(flat(cell, None, reverse), reference(cell, None, reverse), *arguments)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("target", _C.available_cpu_targets())
def test_every_cpu_target(cell: str, target: str) -> None:
    """Sizes around vectors, panels, tiles and blocks."""
    with weft.testing.cpu_target(target):
        for size in [(2, 13, 3, 65), (3, 5, 150, 16), (2, 50, 4, 3), (3, 25, 5, 130)]:
            for dtype in (torch.float32, torch.bfloat16):
                check_against_native(flat(cell), reference(cell), *problem(cell, size, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", _C.available_cpu_targets())
def test_products_of_small_integers_are_exact(target: str, dtype: torch.dtype) -> None:
    """Around panels of three and four vectors, blocks of rows and blocks of terms."""
    for rows, inputs, hidden in [(7, 1, 90), (50, 600, 33), (250, 97, 80), (1100, 17, 5)]:
        layer = weft.nn.RNN(inputs, hidden, nonlinearity="relu", bias=False, dtype=dtype)
        x, w, grad = (
            torch.randint(-1, 2, s).double()
            for s in [(rows, inputs), (hidden, inputs), (rows, hidden)]
        )
        with torch.no_grad():
            layer.weight_ih_l0.copy_(w)
        low = x.to(dtype).unsqueeze(0).requires_grad_()
        with weft.testing.cpu_target(target):
            found, _ = layer(low)
            found.backward(grad.to(dtype).unsqueeze(0))
        sums = x @ w.t()
        of_sums = grad * (sums > 0)
        expected = [sums.relu(), of_sums @ w, of_sums.t() @ x]
        gradients = [low.grad, layer.weight_ih_l0.grad]
        for one, other in zip([found, *gradients], expected, strict=True):
            assert torch.equal(one.view_as(other), other.to(dtype))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lengths(cell: str, reverse: bool, dtype: torch.dtype, device: torch.device) -> None:
    lengths = torch.tensor([2, 5, 1, 0, 4], device=device)
    arguments = problem(cell, (5, 5, 3, 9), dtype, device)
    check_against_native(
        flat(cell, lengths, reverse), reference(cell, lengths, reverse), *arguments
    )


@pytest.mark.parametrize("cell", CELLS)
def test_only_asked_gradients(cell: str, device: torch.device) -> None:
    count = len(problem(cell, (2, 2, 3, 4)))
    for index in range(count):
        arguments = problem(cell, (3, 2, 3, 4), device=device, grad=False)
        arguments[index].requires_grad_()
        check_against_native(flat(cell), reference(cell), *arguments)


@pytest.mark.parametrize("cell", CELLS)
def test_one_output_alone_has_a_gradient(cell: str, device: torch.device) -> None:
    arguments = problem(cell, (3, 2, 3, 4), device=device)
    for index in range(3 if cell == "lstm" else 2):
        found = [
            torch.autograd.grad(f(*arguments)[index].sum(), arguments, materialize_grads=True)
            for f in (flat(cell), reference(cell))
        ]
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("cell", CELLS)
def test_non_contiguous_inputs(cell: str, device: torch.device) -> None:
    arguments = [sliced(t) for t in problem(cell, (4, 3, 5, 7), device=device)]
    check_against_native(flat(cell), reference(cell), *arguments)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("size", [(0, 2, 3, 4), (3, 0, 3, 4)], ids=str)
def test_no_steps_or_rows(cell: str, size: tuple[int, int, int, int], device: torch.device) -> None:
    arguments = problem(cell, size, device=device)
    outputs = flat(cell)(*arguments)
    assert outputs[0].shape == (*size[:2], size[3])
    torch.testing.assert_close(outputs[1:], tuple(arguments[1 : len(outputs)]))
    gradients = torch.autograd.grad(sum(o.sum() for o in outputs), arguments)
    assert all((g == 0).all() for g in gradients[len(outputs) :])


@pytest.mark.parametrize("cell", CELLS)
def test_chunks_equal_one_long_run(cell: str, backend: str, device: torch.device) -> None:
    """To the bit where the input's product is weft's own."""
    tolerance = {"rtol": 0.0, "atol": 0.0} if backend == "cpu" else {}
    for dtype in (torch.float32, torch.bfloat16):
        x, *rest = problem(cell, (7, 3, 4, 19), dtype, device, grad=False)
        states = 2 if cell == "lstm" else 1
        whole, *final = flat(cell)(x, *rest)
        parts, state = [], rest[:states]
        for chunk in (x[:3], x[3:4], x[4:]):
            part, *state = flat(cell)(chunk, *state, *rest[states:])
            parts.append(part)
        torch.testing.assert_close(torch.cat(parts), whole, **tolerance)
        torch.testing.assert_close(list(state), final, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("target", _C.available_cpu_targets())
def test_weight_gradients_over_many_rows_are_exact(
    target: str, reverse: bool, dtype: torch.dtype
) -> None:
    """Small integers and no hidden weights; the first state's rows end within a block of terms."""
    for steps, batch, inputs, hidden in [(300, 5, 20, 7), (3, 500, 33, 70), (3, 350, 65, 2)]:
        x, h0, w, grad = (
            torch.randint(-1, 2, s).double()
            for s in [
                (steps, batch, inputs),
                (batch, hidden),
                (hidden, inputs),
                (steps, batch, hidden),
            ]
        )
        w_ih, w_hh = w.to(dtype).requires_grad_(), torch.zeros(hidden, hidden, dtype=dtype)
        w_hh.requires_grad_()
        with weft.testing.cpu_target(target):
            low = [t.to(dtype) for t in (x, h0)]
            found, _ = rnn_layer("rnn_relu", low[0], (low[1],), w_ih, w_hh, reverse=reverse)
            found.backward(grad.to(dtype))
        sums = x @ w.t()
        of_sums, h, first = grad * (sums > 0), sums.relu(), h0.unsqueeze(0)
        before = torch.cat([h[1:], first] if reverse else [first, h[:-1]])
        for weight, factor in ((w_ih, x), (w_hh, before)):
            expected = torch.einsum("tbh,tbi->hi", of_sums, factor)
            assert weight.grad is not None
            assert torch.equal(weight.grad, expected.to(dtype))


@pytest.mark.parametrize("cell", CELLS)
def test_long_sequences_stay_accurate(cell: str) -> None:
    arguments = problem(cell, (2000, 1, 3, 8), torch.float32, grad=False)
    arguments[-3].mul_(0.5)  # hidden weights of norm below one: errors fade
    outputs = flat(cell)(*arguments)
    exact = flat(cell)(*[t.double() for t in arguments])
    for actual, expected in zip(outputs, exact, strict=True):
        torch.testing.assert_close(actual, expected, check_dtype=False, rtol=1e-4, atol=1e-5)


# ---- gradients of gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("ragged", [False, True])
def test_gradcheck(cell: str, ragged: bool, device: torch.device) -> None:
    lengths = torch.tensor([2, 1], device=device) if ragged else None
    check_gradients(
        flat(cell, lengths, reverse=ragged), *problem(cell, (2, 2, 1, 2), device=device)
    )


@pytest.mark.parametrize("cell", CELLS)
def test_double_backward_matches_native(cell: str, device: torch.device) -> None:
    arguments = problem(cell, (4, 3, 5, 6), device=device)

    def penalty(function: Callable[..., Any]) -> tuple[Tensor, ...]:
        energy = sum((o * o).sum() for o in function(*arguments))
        gradients = torch.autograd.grad(energy, arguments, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in gradients), arguments)

    torch.testing.assert_close(penalty(flat(cell)), penalty(reference(cell)))


# ---- dispatcher, compiler, transforms ------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_compile(cell: str, device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(flat(cell), backend="aot_eager", fullgraph=True)
    check_against_native(compiled, reference(cell), *problem(cell, (3, 2, 4, 5), device=device))


def test_graph_does_not_grow_with_steps() -> None:
    def nodes(steps: int) -> int:
        graph = torch.export.export(weft.nn.LSTM(3, 4, 2), (torch.randn(steps, 2, 3),)).graph
        return len(graph.nodes)

    assert nodes(3) == nodes(50)


@pytest.mark.parametrize("cell", CELLS)
def test_func_grad_and_vmap(cell: str, device: torch.device) -> None:
    x, *rest = problem(cell, (3, 4, 2, 3), device=device, grad=False)
    index = 2 if cell == "lstm" else 1

    def loss(function: Callable[..., Any], weight: Tensor, x: Tensor) -> Tensor:
        changed = [*(state[: x.shape[1]] for state in rest[:index]), weight, *rest[index + 1 :]]
        return function(x, *changed)[0].square().sum()

    def gradient(function: Callable[..., Any], x: Tensor) -> Tensor:
        return torch.func.grad(lambda w: loss(function, w, x))(rest[index])

    torch.testing.assert_close(gradient(flat(cell), x), gradient(reference(cell), x))
    per_sample = torch.func.vmap(lambda row: gradient(flat(cell), row[:, None]), in_dims=1)(x)
    expected = [gradient(reference(cell), x[:, i : i + 1]) for i in range(x.shape[1])]
    torch.testing.assert_close(per_sample, torch.stack(expected))


@pytest.mark.parametrize("cell", CELLS)
def test_autocast(cell: str, device: torch.device) -> None:
    module = weft.convert(native_layer(cell, 3, 5, device=device))
    x = torch.randn(4, 2, 3, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        output, _ = module(x)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    lowered, _ = copy.deepcopy(module).bfloat16()(x.bfloat16())
    assert torch.equal(output, lowered)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("ragged", [False, True])
def test_bits_do_not_depend_on_threads(cell: str, ragged: bool) -> None:
    arguments = problem(cell, (6, 25, 40, 200), torch.float32)
    lengths = torch.randint(0, 7, (25,)) if ragged else None

    def run() -> list[Tensor]:
        outputs = flat(cell, lengths)(*arguments)
        return [*outputs, *torch.autograd.grad(sum(o.sum() for o in outputs), arguments)]

    check_deterministic(run)


# ---- modules -------------------------------------------------------------------------------------


def leaves(value: Any) -> Any:
    """A PackedSequence's values, where there is one."""
    if isinstance(value, PackedSequence):
        return value.data
    return tuple(map(leaves, value)) if isinstance(value, tuple) else value


def both_layers(native: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    module = weft.convert(copy.deepcopy(native))
    assert type(module) is not type(native)
    return module, native


def run_with(module: torch.nn.Module, count: int, *arguments: Any) -> Any:
    values = dict(zip(dict(module.named_parameters()), arguments[:count], strict=True))
    return leaves(torch.func.functional_call(module, values, arguments[count:]))


@pytest.mark.parametrize("torch_class", [torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_module_db(torch_class: type, dtype: torch.dtype, device: torch.device) -> None:
    info = module_info(torch_class)
    for sample in info.module_inputs_func(info, device, dtype, requires_grad=True, training=True):
        made, call = sample.constructor_input, sample.forward_input
        module, native = both_layers(
            torch_class(*made.args, **made.kwargs, device=device, dtype=dtype)
        )
        parameters = [p.detach().requires_grad_() for p in native.parameters()]

        def run(*arguments: Any, like: torch.nn.Module, n: int = len(parameters)) -> Any:
            with torch.random.fork_rng():
                torch.manual_seed(7)  # the masks of dropout
                return run_with(like, n, *arguments)

        if dtype == torch.float64:  # PyTorch's own is exact only by another algorithm
            given = (*parameters, *call.args)
            torch.testing.assert_close(run(*given, like=module), run(*given, like=native))
            continue
        check_against_native(
            lambda *a, m=module: run(*a, like=m),
            lambda *a, m=native: run(*a, like=m),
            *parameters,
            *call.args,
        )


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "case", grid(bias=[True, False], batch_first=[True, False], bidirectional=[True, False])
)
def test_modules(cell: str, case: dict[str, bool], device: torch.device) -> None:
    options = {"num_layers": 2, "device": device, "dtype": torch.float64, **case}
    module, native = both_layers(native_layer(cell, 3, 5, **options))
    layers = 2 * (2 if case["bidirectional"] else 1)
    assert repr(module) == repr(native)
    assert list(module.state_dict()) == list(native.state_dict())
    double = {"dtype": torch.float64, "device": device}
    for batch in ((4,), ()):
        steps = (*batch, 6) if case["batch_first"] and batch else (6, *batch)
        x = torch.randn(*steps, 3, **double, requires_grad=True)
        states = [torch.randn(layers, *batch, 5, **double, requires_grad=True) for _ in range(2)]
        hx = tuple(states) if cell == "lstm" else states[0]
        for given in (hx, None):
            found = []
            for layer in (module, native):
                outputs = layer(x, given)
                final = outputs[1] if cell == "lstm" else outputs[1:]
                found.append([outputs[0], *final])
                energy = sum(o.square().sum() for o in found[-1])
                inputs = [x, *layer.parameters(), *(states if given is hx else ())]
                found[-1] += torch.autograd.grad(
                    energy, inputs, allow_unused=True, materialize_grads=True
                )
            torch.testing.assert_close(*found)
    reverted = weft.revert(module)
    assert type(reverted) is NATIVE[cell]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("in_order", [True, False])
def test_packed_sequences(cell: str, in_order: bool, device: torch.device) -> None:
    options = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64, "device": device}
    module, native = both_layers(native_layer(cell, 3, 4, **options))
    lengths = torch.tensor([5, 3, 3, 1] if in_order else [1, 5, 3, 2])
    x = torch.randn(5, 4, 3, dtype=torch.float64, device=device, requires_grad=True)
    states = [torch.randn(4, 4, 4, dtype=torch.float64, device=device) for _ in range(2)]
    hx = tuple(states) if cell == "lstm" else states[0]
    found = []
    for layer in (module, native):
        for given in (None, hx):
            packed = pack_padded_sequence(x, lengths, enforce_sorted=in_order)
            output, final = layer(packed, given)
            assert isinstance(output, PackedSequence)
            padded, counts = pad_packed_sequence(output)
            gradient = torch.autograd.grad(padded.square().sum(), [x, *layer.parameters()])
            found.append([padded, counts, final, gradient])
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[3])


def test_packed_sequences_heed_no_default_device() -> None:
    packed = pack_padded_sequence(torch.randn(4, 2, 3), torch.tensor([4, 1]))
    module = weft.nn.GRU(3, 5)
    expected, _ = module(packed)
    with torch.device("meta"):
        found, _ = module(packed, torch.zeros(1, 2, 5, device="cpu"))
    assert torch.equal(found.data, expected.data)


@pytest.mark.parametrize("cell", CELLS)
def test_dropout(cell: str, device: torch.device) -> None:
    module, native = both_layers(native_layer(cell, 3, 5, num_layers=3, dropout=0.5, device=device))
    x = torch.randn(4, 2, 3, device=device)
    outputs = []
    for layer in (module, native):
        torch.manual_seed(7)
        outputs.append(layer(x))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(module.eval()(x), native.eval()(x))


@pytest.mark.parametrize("bias", [True, False])
def test_projection(bias: bool, device: torch.device) -> None:
    options = {"num_layers": 2, "bidirectional": True, "proj_size": 2, "bias": bias}
    module, native = both_layers(torch.nn.LSTM(3, 5, **options, device=device))
    x = torch.randn(4, 2, 3, device=device)
    parameters = [p.detach().requires_grad_() for p in native.parameters()]
    check_against_native(
        lambda *a: run_with(module, len(parameters), *a),
        lambda *a: run_with(native, len(parameters), *a),
        *parameters,
        x,
    )


@pytest.mark.parametrize("hidden", [1, 5, 16, 32])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_few_units_over_many_rows(cell: str, hidden: int) -> None:
    """More rows than are copied at once, and strips of weights' rows that are not whole."""
    module, native = both_layers(native_layer(cell, hidden, hidden))
    x = torch.randn(50, 24, hidden)

    def gradients(layer: Any) -> Any:
        return torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))

    expected = gradients(native)
    for _ in range(10):  # what is written past the work memory breaks malloc's heap
        torch.testing.assert_close(gradients(module), expected, atol=1e-3, rtol=1e-4)


def test_backward_in_eval_mode(device: torch.device) -> None:
    module = weft.nn.GRU(3, 4, device=device).eval()
    x = torch.randn(5, 2, 3, device=device, requires_grad=True)
    module(x)[0].sum().backward()
    assert x.grad is not None


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_errors_are_torchs(cell: str, device: torch.device) -> None:
    module, native = both_layers(native_layer(cell, 3, 5, 2, device=device))

    def state(*size: int) -> Any:
        return (torch.zeros(*size, device=device),) * 2 if cell == "lstm" else torch.zeros(*size)

    x = torch.zeros(4, 2, 3, device=device)
    cases = [
        (x[..., :2], None),
        (x[0, 0], None),
        (x[None], None),
        (x, state(2, 3, 5)),
        (x, state(1, 2, 5)),
        (x, state(2, 2, 4)),
        (x, state(2, 5)),
        (x[:, 0], state(2, 1, 5)),
        (x.double(), None),
    ]
    for arguments in cases:
        with pytest.raises((RuntimeError, ValueError)) as expected:
            native(*arguments)
        with pytest.raises(expected.type, match=r"xpected|should|must|does not match"):
            module(*arguments)


def test_op_errors() -> None:
    x, h, w_ih, w_hh, *_ = problem("gru", (3, 2, 4, 5), grad=False)
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, "got 'elman'", lambda: rnn_layer("elman", x, (h,), w_ih, w_hh)),
        (RuntimeError, "weight_hh must be", lambda: rnn_layer("gru", x, (h,), w_ih, w_hh[1:])),
        (RuntimeError, "h0 must be", lambda: rnn_layer("gru", x, (h[:1],), w_ih, w_hh)),
        (RuntimeError, "same dtype", lambda: rnn_layer("gru", x.float(), (h,), w_ih, w_hh)),
        (RuntimeError, "c0", lambda: rnn_layer("gru", x, (h, h), w_ih, w_hh)),
        (
            RuntimeError,
            "lengths must be of dtype int64",
            lambda: rnn_layer("gru", x, (h,), w_ih, w_hh, lengths=torch.ones(2)),
        ),
        (
            RuntimeError,
            r"lengths must be \[2\]",
            lambda: rnn_layer("gru", x, (h,), w_ih, w_hh, lengths=torch.ones(3).long()),
        ),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
