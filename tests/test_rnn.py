"""Recurrent cells against PyTorch and float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import weft
import weft.functional as W
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

CELLS = ["lstm", "gru", "tanh", "relu"]
GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}
MODULES = {
    "lstm": (weft.nn.LSTMCell, torch.nn.LSTMCell),
    "gru": (weft.nn.GRUCell, torch.nn.GRUCell),
    "tanh": (weft.nn.RNNCell, torch.nn.RNNCell),
    "relu": (weft.nn.RNNCell, torch.nn.RNNCell),
}


def lstm(
    function: Callable[..., Any],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """lstm_cell with its state as two arguments: gradcheck wants tensors."""
    return lambda input, h, c, *rest: function(input, (h, c), *rest)


WEFT = {
    "lstm": lstm(W.lstm_cell),
    "gru": W.gru_cell,
    "tanh": W.rnn_cell,
    "relu": partial(W.rnn_cell, nonlinearity="relu"),
}
NATIVE = {
    "lstm": lstm(torch.lstm_cell),
    "gru": torch.gru_cell,
    "tanh": torch.rnn_tanh_cell,
    "relu": torch.rnn_relu_cell,
}


def problem(
    cell: str,
    batch: int,
    inputs: int,
    hidden: int,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    bias: bool = True,
    grad: bool = True,
) -> list[Tensor | None]:
    """Random arguments of a cell: input, h, (c,) w_ih, w_hh, b_ih, b_hh."""
    gates = GATES[cell]
    sizes: list[tuple[int, ...]] = [(batch, inputs), (batch, hidden)]
    if cell == "lstm":
        sizes.append((batch, hidden))
    sizes += [(gates * hidden, inputs), (gates * hidden, hidden)]
    scale = (inputs + hidden) ** -0.5
    tensors: list[Tensor | None] = [
        torch.randn(size, dtype=dtype, device=device).mul(scale if size[0] > batch else 1)
        for size in sizes
    ]
    for _ in range(2):
        tensors.append(torch.randn(gates * hidden, dtype=dtype, device=device) if bias else None)
    return [t if t is None else t.requires_grad_(grad) for t in tensors]


# ---- values and gradients ------------------------------------------------------------------------

SHAPES = [(6, 1, 1), (1, 6, 4), (2, 3, 5), (4, 16, 16), (3, 17, 33), (7, 70, 31), (65, 9, 8)]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_matches_native(
    cell: str, dtype: torch.dtype, shape: Sequence[int], bias: bool, device: torch.device
) -> None:
    check_against_native(WEFT[cell], NATIVE[cell], *problem(cell, *shape, dtype, device, bias))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("target", _C.available_cpu_targets())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_cpu_target(cell: str, target: str, dtype: torch.dtype) -> None:
    with weft.testing.cpu_target(target):
        for shape in [(1, 5, 3), (5, 40, 19), (3, 64, 66)]:
            check_against_native(WEFT[cell], NATIVE[cell], *problem(cell, *shape, dtype))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("target", _C.available_cpu_targets())
def test_sizes_around_vectors_and_tiles(cell: str, target: str) -> None:
    """Small integers have exact sums: a lane too many or too few is not a rounding error."""
    with weft.testing.cpu_target(target), torch.no_grad():
        for extent in range(1, 71):
            batch, inputs, hidden = 1 + extent % 9, extent, 1 + (extent * 37) % 70
            arguments = [
                t if t is None else t.mul(2).round().div(8)
                for t in problem(cell, batch, inputs, hidden, torch.float32, grad=False)
            ]
            actual = WEFT[cell](*arguments)
            exact = NATIVE[cell](*[None if t is None else t.double() for t in arguments])
            torch.testing.assert_close(actual, exact, check_dtype=False)


@pytest.mark.parametrize("cell", CELLS)
@given(
    batch=st.integers(0, 9),
    inputs=st.integers(1, 40),
    hidden=st.integers(1, 40),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_random_problems_against_float64(
    cell: str, batch: int, inputs: int, hidden: int, bias: bool, seed: int, device: torch.device
) -> None:
    torch.manual_seed(seed)
    arguments = problem(cell, batch, inputs, hidden, torch.float64, device, bias)
    torch.testing.assert_close(WEFT[cell](*arguments), NATIVE[cell](*arguments))


@pytest.mark.parametrize("target", _C.available_cpu_targets())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_small_integers_are_exact(target: str, dtype: torch.dtype) -> None:
    """Around vectors, panels, pairs of terms and tiles; an infinity stays one."""
    with weft.testing.cpu_target(target):
        for batch, inputs, hidden in itertools.product((1, 8, 9, 50), (1, 16, 33), (5, 64, 71)):
            sizes = [(batch, inputs), (batch, hidden), (hidden, inputs), (hidden, hidden)]
            x, h, w_ih, w_hh = exact = [torch.randint(-1, 2, s).double() for s in sizes]
            x[0, 0], w_ih[:, 0] = float("inf"), 1
            low = [t.to(dtype) for t in exact]
            found = W.rnn_cell(*low, nonlinearity="relu")
            assert torch.equal(found.double(), (x @ w_ih.t() + h @ w_hh.t()).relu())
            x[0, 0] = 0
            grad = torch.randint(-1, 2, (batch, hidden)).double()
            gradients = torch.ops.weft.rnn_cell_gradients(
                grad.to(dtype), torch.ones_like(found), x.to(dtype), *low[1:], True, [True] * 5
            )
            expected = [grad @ w_ih, grad @ w_hh, grad.t() @ x, grad.t() @ h, grad.sum(0)]
            for one, other in zip(gradients, expected, strict=True):
                assert torch.equal(one.double(), other)


@pytest.mark.parametrize("cell", CELLS)
def test_one_output_alone_has_a_gradient(cell: str, device: torch.device) -> None:
    arguments = problem(cell, 3, 4, 5, device=device)
    inputs = [t for t in arguments if t is not None]
    for index in range(2 if cell == "lstm" else 1):

        def gradients(function: Callable[..., Any], index: int = index) -> tuple[Tensor, ...]:
            outputs = function(*arguments)
            output = outputs[index] if cell == "lstm" else outputs
            return torch.autograd.grad(output.sum(), inputs, allow_unused=True)

        for actual, expected in zip(gradients(WEFT[cell]), gradients(NATIVE[cell]), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_only_asked_gradients_are_computed(cell: str, device: torch.device) -> None:
    count = len(problem(cell, 2, 3, 4))
    for index in range(count):
        arguments = problem(cell, 2, 3, 4, device=device, grad=False)
        arguments[index].requires_grad_()
        check_against_native(WEFT[cell], NATIVE[cell], *arguments)


@pytest.mark.parametrize("cell", CELLS)
def test_non_contiguous_inputs(cell: str, device: torch.device) -> None:
    arguments = problem(cell, 4, 10, 12, device=device)
    check_against_native(WEFT[cell], NATIVE[cell], *[sliced(t) for t in arguments])
    transposed = [t.detach().t().contiguous().t().requires_grad_() for t in arguments[:-2]]
    check_against_native(WEFT[cell], NATIVE[cell], *transposed, *arguments[-2:])
    expanded = [t.detach()[:1].expand_as(t) for t in arguments]
    check_against_native(WEFT[cell], NATIVE[cell], *expanded)
    # Gradients arrive expanded from sum().
    torch.testing.assert_close(
        torch.autograd.grad(WEFT[cell](*arguments)[0].sum(), arguments[0]),
        torch.autograd.grad(NATIVE[cell](*arguments)[0].sum(), arguments[0]),
    )


@pytest.mark.parametrize("cell", CELLS)
def test_empty_batch(cell: str, device: torch.device) -> None:
    check_against_native(WEFT[cell], NATIVE[cell], *problem(cell, 0, 3, 4, device=device))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_inputs(cell: str, dtype: torch.dtype, device: torch.device) -> None:
    inf, nan = float("inf"), float("nan")
    values = [0.0, 1e4, -1e4, inf, -inf, nan, 80.0, -80.0, 100.0, -100.0, 1e-30, -3e-5]
    eye = torch.eye(len(values), dtype=dtype, device=device)
    gates = GATES[cell]
    w_ih = torch.cat([torch.ones(len(values), 1, dtype=dtype, device=device)] * gates)
    w_hh = torch.cat([eye] * gates).mul(0)
    x = torch.tensor(values, dtype=dtype, device=device)[:, None]
    finite = torch.randn(len(values), len(values), dtype=dtype, device=device)
    states = [finite, finite] if cell == "lstm" else [finite]
    check_against_native(WEFT[cell], NATIVE[cell], x, *states, w_ih, w_hh)
    # The state itself extreme: c for the LSTM, h for the GRU, one value in every unit.
    x = torch.randn(len(values), 1, dtype=dtype, device=device)
    extreme = torch.tensor(values, dtype=dtype, device=device)[:, None].repeat(1, len(values))
    states = [finite, extreme] if cell == "lstm" else [extreme]
    check_against_native(WEFT[cell], NATIVE[cell], x, *states, w_ih, w_hh)


@pytest.mark.parametrize("target", _C.available_cpu_targets())
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 90), (torch.float64, 710)], ids=str)
def test_gate_functions_are_within_three_ulps(target: str, dtype: torch.dtype, limit: int) -> None:
    """sigmoid and tanh alone: a GRU whose gates all see x, and an LSTM with h' = σ(x) tanh(x)."""
    x = torch.linspace(-limit, limit, 20001, dtype=dtype)
    x = torch.cat([x, torch.linspace(-1, 1, 20001, dtype=dtype)])
    x = torch.cat([x, torch.logspace(-20, 0, 2001, dtype=dtype)])[:, None]
    zero, one = torch.zeros_like(x), torch.ones(1, 1, dtype=dtype)
    with weft.testing.cpu_target(target):
        weights = torch.cat([one * 0, one * 0, one])  # r = z = 1/2, n = tanh(x): h' = n / 2
        tanh = 2 * W.gru_cell(x, zero, weights, torch.zeros(3, 1, dtype=dtype))
        # i = σ(x), f = o = 1/2, g = tanh(100) = 1: c' = σ(x)
        weights = torch.cat([one, one * 0, one * 0, one * 0])
        bias = torch.tensor([0, 0, 100, 0], dtype=dtype)
        hidden = torch.zeros(4, 1, dtype=dtype)
        _, sigmoid = W.lstm_cell(x, (zero, zero), weights, hidden, bias, bias * 0)
    unit = torch.finfo(dtype).eps
    for actual, function in ((tanh, torch.tanh), (sigmoid, torch.sigmoid)):
        exact = function(x.double())
        # float64 has nothing wider here: torch's own value, itself within 1 ulp, is the reference.
        assert ((actual.double() - exact).abs() <= 3 * unit * exact.abs() + 1e-37).all()


# ---- gradients of gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_gradcheck(cell: str, bias: bool, device: torch.device) -> None:
    check_gradients(WEFT[cell], *problem(cell, 2, 3, 2, device=device, bias=bias))


@pytest.mark.parametrize("cell", CELLS)
def test_double_backward_matches_native(cell: str, device: torch.device) -> None:
    arguments = problem(cell, 3, 9, 18, device=device)

    def penalty(function: Callable[..., Any]) -> tuple[Tensor, ...]:
        outputs = function(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        energy = sum((o * o).sum() for o in outputs)
        gradients = torch.autograd.grad(energy, arguments, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in gradients), arguments)

    torch.testing.assert_close(penalty(WEFT[cell]), penalty(NATIVE[cell]))


@pytest.mark.parametrize("cell", CELLS)
def test_backward_through_many_steps(cell: str, device: torch.device) -> None:
    """A sequence unrolled by hand; the same weights in every step."""
    arguments = problem(cell, 2, 4, 6, device=device)
    weights = arguments[-4:]

    def run(function: Callable[..., Any]) -> tuple[Tensor, ...]:
        state = arguments[1:-4]
        for step in range(5):
            outputs = function(arguments[0] * (step + 1), *state, *weights)
            state = list(outputs) if cell == "lstm" else [outputs]
        return torch.autograd.grad(state[0].sum(), arguments)

    torch.testing.assert_close(run(WEFT[cell]), run(NATIVE[cell]))


# ---- dispatcher, compiler, transforms ------------------------------------------------------------


def test_opcheck(device: torch.device) -> None:
    x, h, c, w_ih, w_hh, b_ih, b_hh = problem("lstm", 2, 3, 4, device=device, grad=False)
    ops = torch.ops.weft
    h_next, c_next, gates = ops.lstm_cell(x, h, c, w_ih, w_hh, b_ih, b_hh, True)
    wanted = [True, False, True, True, False, True]
    cases = [
        (ops.lstm_cell, (x, h, c, w_ih, w_hh, b_ih, None, True)),
        (ops.lstm_cell, (x, h, c, w_ih, w_hh, None, b_hh, False)),
        (ops.lstm_cell_backward, (h_next, None, gates, c, c_next)),
        (ops.lstm_cell_double_backward, (gates, c, None, h, gates, c)),
        (ops.lstm_cell_gradients, (h, c, gates, x, h, c, c_next, w_ih, w_hh, wanted)),
    ]
    x, h, w_ih, w_hh, b_ih, b_hh = problem("gru", 2, 3, 4, device=device, grad=False)
    h_next, gates = ops.gru_cell(x, h, w_ih, w_hh, b_ih, b_hh, True)
    sums = torch.randn(2, 12, dtype=torch.float64, device=device)
    cases += [
        (ops.gru_cell, (x, h, w_ih, w_hh, b_ih, b_hh, True)),
        (ops.gru_cell_backward, (h_next, gates, h)),
        (ops.gru_cell_double_backward, (sums, None, h, h_next, gates, h)),
        (ops.gru_cell_gradients, (h_next, gates, x, h, w_ih, w_hh, wanted)),
    ]
    x, h, w_ih, w_hh, b_ih, b_hh = problem("tanh", 2, 3, 4, device=device, grad=False)
    cases += [
        (ops.rnn_cell, (x, h, w_ih, w_hh, b_ih, None, True)),
        (ops.rnn_cell_gradients, (h, h.tanh(), x, h, w_ih, w_hh, False, wanted[1:])),
    ]
    for op, arguments in cases:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("cell", CELLS)
def test_compile(cell: str, device: torch.device) -> None:
    arguments = problem(cell, 3, 4, 5, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(WEFT[cell], backend="aot_eager", fullgraph=True)
    for weights_grad in (True, False):
        for t in arguments[-4:]:
            t.requires_grad_(weights_grad)
        check_against_native(compiled, NATIVE[cell], *arguments)


def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    module = weft.nn.LSTMCell(4, 5)
    x, h, c = torch.randn(3, 4), torch.randn(3, 5), torch.randn(3, 5)
    compiled = torch.compile(module, fullgraph=True)
    torch.testing.assert_close(compiled(x, (h, c)), module(x, (h, c)))


@pytest.mark.parametrize("cell", CELLS)
def test_func_grad_and_vmap(cell: str, device: torch.device) -> None:
    arguments = problem(cell, 3, 4, 5, device=device, grad=False)
    index = len(arguments) - 4

    def loss(function: Callable[..., Any], weight: Tensor, rows: list[Tensor]) -> Tensor:
        outputs = function(*rows, weight, *arguments[index + 1 :])
        return (outputs[0] if cell == "lstm" else outputs).square().sum()

    def both(transform: Callable[..., Any]) -> None:
        actual, expected = (transform(f) for f in (WEFT[cell], NATIVE[cell]))
        torch.testing.assert_close(actual, expected)

    rows = arguments[:index]
    both(lambda f: torch.func.grad(lambda w: loss(f, w, rows))(arguments[index]))
    # Per-sample gradients of a weight.
    both(
        lambda f: torch.func.vmap(
            torch.func.grad(lambda w, *row: loss(f, w, [r[None] for r in row])),
            in_dims=(None,) + (0,) * index,
        )(arguments[index], *rows)
    )


@pytest.mark.parametrize("cell", CELLS)
def test_autocast(cell: str, device: torch.device) -> None:
    arguments = problem(cell, 3, 4, 5, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        outputs = WEFT[cell](*arguments)
    lowered = [t.detach().bfloat16() for t in arguments]
    torch.testing.assert_close(outputs, WEFT[cell](*lowered), rtol=0, atol=0)
    output = outputs[0] if cell == "lstm" else outputs
    output.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in arguments if t.grad is not None)
    assert arguments[0].grad is not None


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", [(3, 40, 50), (130, 96, 200)], ids=str)
def test_bits_do_not_depend_on_threads(cell: str, shape: Sequence[int]) -> None:
    arguments = problem(cell, *shape, torch.float32)

    def run() -> list[Tensor]:
        outputs = WEFT[cell](*arguments)
        outputs = list(outputs) if cell == "lstm" else [outputs]
        return outputs + list(torch.autograd.grad(sum(o.sum() for o in outputs), arguments))

    check_deterministic(run)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", [(6, 37, 45), (14, 301, 256), (13, 256, 277)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", _C.available_cpu_targets())
def test_a_row_does_not_depend_on_its_batch(
    cell: str, shape: Sequence[int], dtype: torch.dtype, target: str
) -> None:
    """Equal bits alone and in a batch: other tiles, and copies of rows, add in the same order."""
    arguments = problem(cell, *shape, dtype, grad=False)
    state = 2 if cell == "lstm" else 1
    rows, weights = arguments[: 1 + state], arguments[1 + state :]
    with weft.testing.cpu_target(target):
        together = WEFT[cell](*rows, *weights)
        for i in range(shape[0]):
            alone = WEFT[cell](*[r[i : i + 1] for r in rows], *weights)
            if cell != "lstm":
                assert torch.equal(alone[0], together[i])
            else:
                assert torch.equal(alone[0][0], together[0][i])
                assert torch.equal(alone[1][0], together[1][i])


def test_unknown_nonlinearity() -> None:
    arguments = problem("tanh", 1, 2, 2)
    with pytest.raises(RuntimeError, match="must be 'tanh' or 'relu', got 'sigmoid'"):
        W.rnn_cell(*arguments, nonlinearity="sigmoid")


# ---- modules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module_db(cell: str, dtype: torch.dtype, device: torch.device) -> None:
    weft_class, torch_class = MODULES[cell]
    info = module_info(torch_class)
    for sample in info.module_inputs_func(info, device, dtype, requires_grad=True, training=True):
        made = sample.constructor_input
        options = {"nonlinearity": cell} if cell in ("tanh", "relu") else {}
        options |= made.kwargs
        module = torch_class(*made.args, **options, device=device, dtype=dtype)
        call = sample.forward_input
        parameters = [p.requires_grad_() for p in module.parameters()]

        def run(
            module_class: type,
            *arguments: Any,
            like: torch.nn.Module = module,
            n: int = len(parameters),
        ) -> Any:
            values = dict(zip(dict(like.named_parameters()), arguments[:n], strict=True))
            options = {"nonlinearity": like.nonlinearity} if hasattr(like, "nonlinearity") else {}
            sizes = like.input_size, like.hidden_size, like.bias
            fresh = module_class(*sizes, device="meta", **options)
            return torch.func.functional_call(fresh, values, arguments[n:])

        check_against_native(
            lambda *a: run(weft_class, *a), lambda *a: run(torch_class, *a), *parameters, *call.args
        )


@pytest.mark.parametrize("cell", CELLS)
def test_module_db_errors(cell: str, device: torch.device) -> None:
    weft_class = MODULES[cell][0]
    info = module_info(torch.nn.GRUCell)
    cases = info.module_error_inputs_func(
        info, device, torch.float32, requires_grad=False, training=False
    )
    for case in cases:
        made, call = (
            case.module_error_input.constructor_input,
            case.module_error_input.forward_input,
        )
        module = weft_class(*made.args[:2], device=device)
        x, state = call.args
        with pytest.raises(case.error_type, match=case.error_regex.replace("hidden to", ".* to")):
            module(x, (state, state) if cell == "lstm" else state)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("case", grid(bias=[True, False], batched=[True, False]), ids=str)
def test_module_states(cell: str, case: dict[str, bool], device: torch.device) -> None:
    weft_class, torch_class = MODULES[cell]
    options = {"nonlinearity": cell} if cell in ("tanh", "relu") else {}
    native = torch_class(5, 7, bias=case["bias"], device=device, **options)
    module = weft.convert(torch_class(5, 7, bias=case["bias"], device=device, **options))
    assert type(module) is weft_class
    module.load_state_dict(native.state_dict())
    rows = (3,) if case["batched"] else ()
    x = torch.randn(*rows, 5, device=device)
    state: Any = torch.randn(*rows, 7, device=device)
    state = (state, state + 1) if cell == "lstm" else state
    torch.testing.assert_close(module(x), native(x))
    torch.testing.assert_close(module(x, state), native(x, state))
    assert repr(module) == repr(native)
    assert type(weft.revert(module)) is torch_class


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_errors_are_torchs(cell: str, device: torch.device) -> None:
    def broken(index: int, change: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        arguments = problem(cell, 3, 4, 5, torch.float32, device, grad=False)
        arguments[index] = change(arguments[index])
        return arguments

    last = len(problem(cell, 1, 1, 1)) - 1
    cases = [
        broken(0, lambda t: t[:, :3]),  # input size
        broken(0, lambda t: t[:2]),  # batch
        broken(1, lambda t: t[:, :4]),  # hidden size
        broken(1, lambda t: t[:1]),
        broken(last - 3, lambda t: t[:-1]),  # rows of weights
        broken(last - 2, lambda t: t[:-1]),
        broken(last, lambda t: t[:-1]),  # bias
        broken(0, lambda t: t.double()),  # dtypes that differ
        broken(last - 3, lambda t: t.double()),
        [
            None if t is None else t.long()
            for t in problem(cell, 3, 4, 5, device=device, grad=False)
        ],
    ]
    name = cell if cell in ("lstm", "gru") else "rnn"
    reason = rf"weft::{name}_cell: .*(got|expected|must|doesn't match)"
    for arguments in cases:
        # torch takes integers in the Elman cell alone.
        if name != "rnn" or arguments[0].is_floating_point():
            with pytest.raises(RuntimeError):
                NATIVE[cell](*arguments)
        with pytest.raises(RuntimeError, match=reason):
            WEFT[cell](*arguments)
    with pytest.raises(RuntimeError, match="must be"):
        WEFT[cell](*broken(0, lambda t: t[0]))
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match="device"):
            WEFT[cell](*broken(1, lambda t: t.to("meta")))
