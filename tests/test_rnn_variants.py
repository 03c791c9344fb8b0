"""What torch's recurrent layers lack, against plain steps in torch's own operations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import weft
import weft.testing
from harness import DTYPES, check_against_native, check_deterministic, sliced
from rnn_cases import CELLS, KINDS, SIZE, has_cell, layer, masks, plain, problem
from weft import _C
from weft.rnn_layer import random_mask

# ---- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_plain_steps(cell: str, kind: str, device: torch.device) -> None:
    options = masks(cell, kind, SIZE, torch.float32, device)
    arguments = problem(cell, SIZE, torch.float32, device)
    check_against_native(layer(cell, options), plain(cell, options), **arguments)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(cell: str, dtype: torch.dtype, device: torch.device) -> None:
    options = masks(cell, "all", SIZE, dtype, device)
    check_against_native(
        layer(cell, options), plain(cell, options), **problem(cell, SIZE, dtype, device)
    )


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("target", _C.available_cpu_targets())
def test_every_cpu_target(cell: str, target: str) -> None:
    with weft.testing.cpu_target(target):
        for size in [(2, 13, 3, 65), (3, 25, 5, 130)]:
            options = masks(cell, "resets", size, torch.float32, "cpu")
            check_against_native(
                layer(cell, options), plain(cell, options), **problem(cell, size, torch.float32)
            )


@pytest.mark.parametrize("cell", CELLS)
def test_recompute_gives_the_same_bits(cell: str, device: torch.device) -> None:
    options = masks(cell, "all", SIZE, torch.float32, device)
    arguments = problem(cell, SIZE, torch.float32, device)
    found = []
    for recompute in (False, True):
        outputs = layer(cell, options | {"recompute": recompute})(**arguments)
        energy = sum(o.square().sum() for o in outputs)
        found.append((outputs, torch.autograd.grad(energy, list(arguments.values()))))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def kept_bytes(module: torch.nn.Module, x: Tensor) -> int:
    """What autograd keeps for backward, parameters and input apart."""
    known = {t.data_ptr() for t in (x, *module.parameters())}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in known:
            sizes[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    return sum(sizes.values())


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_memory_kept_for_backward(name: str) -> None:
    x = torch.randn(20, 4, 16, requires_grad=True)
    states = x.numel() * 4 * (2 if name == "LSTM" else 1)
    native = kept_bytes(getattr(torch.nn, name)(16, 16), x)
    assert kept_bytes(getattr(weft.nn, name)(16, 16), x) <= native
    assert kept_bytes(getattr(weft.nn, name)(16, 16, recompute=True), x) <= states


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "size",
    [(4, 25, 20, 200), (16, 26, 3, 40), (60, 1, 8, 128)],
    ids=["by units", "by rows", "one row by units"],
)
def test_bits_do_not_depend_on_threads(cell: str, size: tuple[int, int, int, int]) -> None:
    options = masks(cell, "all", size, torch.float32, "cpu")
    arguments = problem(cell, size, torch.float32)

    def run() -> list[Tensor]:
        outputs = layer(cell, options)(**arguments)
        energy = sum(o.square().sum() for o in outputs)
        inputs = list(arguments.values())
        gradients = torch.autograd.grad(energy, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)
        return [*outputs, *gradients, *second]

    check_deterministic(run)


@pytest.mark.parametrize("cell", CELLS)
def test_a_reset_cuts_what_is_not_finite(cell: str, device: torch.device) -> None:
    arguments = {n: t.detach() for n, t in problem(cell, (3, 2, 3, 5), device=device).items()}
    resets = torch.tensor([[True, True], [False, False], [False, True]], device=device)
    expected = layer(cell, {"resets": resets})(**arguments)
    arguments["h"] = torch.full_like(arguments["h"], torch.nan)
    torch.testing.assert_close(layer(cell, {"resets": resets})(**arguments), expected)


# ---- gradients of gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", ["plain", "resets", "zoneout", "all"])
def test_gradcheck(cell: str, kind: str, device: torch.device) -> None:
    size = (3, 2, 1, 2)
    options = masks(cell, kind, size, torch.float64, device)
    arguments = problem(cell, size, device=device)

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        return layer(cell, options)(**dict(zip(arguments, values, strict=True)))

    values = tuple(arguments.values())
    assert torch.autograd.gradcheck(run, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, values, fast_mode=True)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_double_backward_matches_plain_steps(
    cell: str, dtype: torch.dtype, device: torch.device
) -> None:
    options = masks(cell, "all", SIZE, dtype, device)

    def penalty(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
        def run(**arguments: Tensor) -> tuple[Tensor, ...]:
            inputs = [t for t in arguments.values() if t.requires_grad]
            energy = sum((o * o).sum() for o in function(**arguments))
            gradients = torch.autograd.grad(energy, inputs, create_graph=True)
            return torch.autograd.grad(sum((g * g).sum() for g in gradients), inputs)

        return run

    arguments = problem(cell, SIZE, dtype, device)
    check_against_native(penalty(layer(cell, options)), penalty(plain(cell, options)), **arguments)


@pytest.mark.parametrize("cell", CELLS)
def test_double_backward_of_one_gradient(cell: str, device: torch.device) -> None:
    """Each gradient alone, so that all other directions are absent."""
    arguments = problem(cell, (3, 2, 2, 3), device=device)
    inputs = list(arguments.values())
    found = []
    for function in (layer(cell, {}), plain(cell, {})):
        energy = sum(o.square().sum() for o in function(**arguments)[:1])
        gradients = torch.autograd.grad(energy, inputs, create_graph=True, materialize_grads=True)
        found.append(
            [
                torch.autograd.grad(g.square().sum(), inputs, retain_graph=True)
                for g in gradients
                if g.requires_grad
            ]
        )
    torch.testing.assert_close(*found)


# ---- dispatcher, compiler, transforms ------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell: str, device: torch.device) -> None:
    size = (3, 2, 4, 5)
    given = {n: t.detach() for n, t in problem(cell, size, device=device).items()}
    options = masks(cell, "all", size, torch.float64, device)
    names = ("x", "h", "c", "w_ih", "w_hh", "b_ih", "b_hh", "peephole", "w_hr")
    names = (*names, "norm_ih", "norm_hh")
    tensors = [given.get(name) for name in names]
    zones = (*options["zones"], None)[:2]
    how = (options["lengths"], options["resets"], options["dropout"], *zones, 0.3)
    how = (*how, cell.split(",")[0], True)
    ops, kinds = torch.ops.weft, ("test_schema", "test_faketensor")
    for keep in (True, False):
        torch.library.opcheck(ops.rnn_layer, (*tensors, *how, keep), test_utils=kinds)
    output, h_n, c_n, *kept = ops.rnn_layer(*tensors, *how, True)
    grads = (output, h_n, c_n if has_cell(cell) else None)
    wanted = [t is not None for t in tensors]
    arguments = (*grads, *tensors[:5], *tensors[7:], output, *kept, *how, wanted)
    torch.library.opcheck(ops.rnn_layer_gradients, arguments, test_utils=kinds)
    second = (*tensors, *grads, *tensors, *how, [True, True, has_cell(cell), *wanted])
    torch.library.opcheck(ops.rnn_layer_double_backward, second, test_utils=kinds)


@pytest.mark.parametrize("cell", CELLS)
def test_compile(cell: str, device: torch.device) -> None:
    torch._dynamo.reset()
    size = (3, 2, 4, 5)
    options = masks(cell, "all", size, torch.float32, device)
    compiled = torch.compile(layer(cell, options), backend="aot_eager", fullgraph=True)
    arguments = problem(cell, size, torch.float32, device)
    check_against_native(compiled, plain(cell, options), **arguments)


@pytest.mark.parametrize("cell", CELLS)
def test_compiled_graphs_do_not_grow_with_steps(cell: str) -> None:
    def nodes(steps: int) -> list[int]:
        counts: list[int] = []

        def count(module: Any, _: Any) -> Any:
            counts.append(len(module.graph.nodes))
            return make_boxed_func(module.forward)

        torch._dynamo.reset()
        size = (steps, 2, 3, 4)
        options = masks(cell, "all", size, torch.float32, "cpu")
        run = torch.compile(
            layer(cell, options),
            backend=aot_autograd(fw_compiler=count, bw_compiler=count),
            fullgraph=True,
            dynamic=False,
        )
        run(**problem(cell, size, torch.float32))[0].sum().backward()
        return counts

    assert len(nodes(10)) == 2
    assert nodes(10) == nodes(100)


@pytest.mark.parametrize("cell", CELLS)
def test_func_grad_and_vmap(cell: str, device: torch.device) -> None:
    size = (3, 2, 2, 3)
    given = {n: t.detach() for n, t in problem(cell, size, device=device).items()}
    options = {"resets": torch.rand(3, 2, device=device) < 0.4, "zoneout": 0.2}

    def gradient(function: Callable[..., Any], x: Tensor) -> Tensor:
        def loss(w: Tensor) -> Tensor:
            return function(**given | {"x": x, "w_hh": w})[0].square().sum()

        return torch.func.grad(loss)(given["w_hh"])

    inputs = torch.randn(2, *size[:3], dtype=torch.float64, device=device)
    found = torch.func.vmap(lambda x: gradient(layer(cell, options), x))(inputs)
    expected = [gradient(plain(cell, options), x) for x in inputs]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("cell", CELLS)
def test_non_contiguous_inputs(cell: str, device: torch.device) -> None:
    arguments = {n: sliced(t) for n, t in problem(cell, device=device).items()}
    options = masks(cell, "all", SIZE, torch.float64, device)
    check_against_native(layer(cell, options), plain(cell, options), **arguments)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("size", [(0, 2, 3, 4), (3, 0, 3, 4)], ids=str)
def test_no_steps_or_rows(cell: str, size: tuple[int, int, int, int], device: torch.device) -> None:
    arguments = problem(cell, size, device=device)
    inputs = list(arguments.values())
    outputs = layer(cell, {})(**arguments)
    gradients = torch.autograd.grad(
        sum(o.square().sum() for o in outputs), inputs, create_graph=True
    )
    second = torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)
    assert all((g == 0).all() for g in (*gradients[3:], *second[3:]))


# ---- modules -------------------------------------------------------------------------------------

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"peephole": "standard"}),
    ("LSTM", {"peephole": "previous", "zoneout": 0.2}),
    ("LSTM", {"coupled_gates": True, "recurrent_dropout": 0.3}),
    ("LSTM", {"proj_size": 2, "peephole": "standard", "zoneout": 0.2, "recurrent_dropout": 0.3}),
    ("LSTM", {"proj_size": 2, "coupled_gates": True}),
    ("GRU", {"zoneout": 0.2, "recompute": True}),
    ("GRU", {"reset_after": False}),
    ("RNN", {"zoneout": 0.2, "recurrent_dropout": 0.3}),
    ("LSTM", {"layer_norm": True, "peephole": "standard", "zoneout": 0.2}),
    ("LSTM", {"layer_norm": True, "coupled_gates": True, "proj_size": 2}),
    ("GRU", {"layer_norm": True, "reset_after": False}),
    ("RNN", {"layer_norm": True, "recompute": True}),
    ("LSTM", {"recompute": True}),
]


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before", "rnn_tanh"])
@pytest.mark.parametrize("kind", ["reverse", "resets", "zones"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_what_is_kept(cell: str, kind: str, dtype: torch.dtype) -> None:
    """A long sequence that keeps nothing makes the input's products in parts."""
    size = (1700, 32, 5, 96)
    options = masks(cell, kind, size, dtype, "cpu")
    arguments = problem(cell, size, dtype)
    kept = layer(cell, options)(**arguments)
    with torch.no_grad():
        found = layer(cell, options)(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_masks(dtype: torch.dtype) -> None:
    def draw(count: int, p: float) -> Tensor:
        seed, like = torch.tensor([5]), torch.empty(0, dtype=dtype)
        return torch.ops.weft.random_mask(seed, like, [count], p)

    masks = {p: draw(50_003, p) for p in (0.0, 0.3, 1.0)}
    for p, mask in masks.items():
        assert set(mask.tolist()) == ({p} if p in (0, 1) else {0.0, 1.0})
        assert abs(mask.double().mean() - p) < 5 * (p * (1 - p) / len(mask)) ** 0.5 + 1e-9
    for target in _C.available_cpu_targets():
        with weft.testing.cpu_target(target):
            assert torch.equal(draw(1003, 0.3), masks[0.3][:1003])
    with weft.testing.host_execution():
        assert torch.equal(draw(1003, 0.3), masks[0.3][:1003])
    torch.manual_seed(1)
    first = [random_mask(masks[0.3], (40, 7), 0.5) for _ in range(2)]
    torch.manual_seed(1)
    assert torch.equal(random_mask(masks[0.3], (40, 7), 0.5), first[0])
    assert not torch.equal(*first)
    arguments = (torch.tensor([5]), masks[0.3], [3, 4], 0.3)
    torch.library.opcheck(torch.ops.weft.random_mask.default, arguments)


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_modules(name: str, options: dict[str, Any], device: torch.device) -> None:
    module = getattr(weft.nn, name)(3, 5, 2, bidirectional=True, device=device, **options)
    shown = repr(module)
    assert all(f"{key}={value}" in shown for key, value in options.items())
    other = copy.deepcopy(module)
    other.load_state_dict(module.state_dict())
    x = torch.randn(6, 4, 3, device=device, requires_grad=True)
    for layer_ in (module.train(), module.eval()):
        torch.manual_seed(3)
        output, _ = layer_(x)
        torch.manual_seed(3)
        torch.testing.assert_close(other.train(layer_.training)(x)[0], output, rtol=0, atol=0)
        gradients = torch.autograd.grad(output.square().sum(), [x, *module.parameters()])
        assert all(g.isfinite().all() and (g != 0).any() for g in gradients)
    peepholes = [n for n, _ in module.named_parameters() if "peephole" in n]
    if "peephole" in options:
        assert peepholes == [
            f"weight_peephole_l{k}{suffix}" for k in range(2) for suffix in ("", "_reverse")
        ]
        assert module.weight_peephole_l0.shape == (15,)
    if "layer_norm" in options:
        assert "weight_norm_hh_l1_reverse" in module.state_dict()
        assert (module.weight_norm_ih_l0 == 1).all()
    if "coupled_gates" in options:
        assert module.weight_ih_l0.shape == (15, 3)


def test_zoneout_is_in_evaluation_what_it_is_on_average() -> None:
    """One step: the state is the expectation over masks."""
    module = weft.nn.LSTM(3, 4, zoneout=0.3)
    x, h, c = torch.randn(1, 1, 3), torch.randn(1, 1, 4), torch.randn(1, 1, 4)
    many = torch.stack([torch.cat(module(x, (h, c))[1]) for _ in range(2000)]).mean(0)
    torch.testing.assert_close(many, torch.cat(module.eval()(x, (h, c))[1]), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_are_packing(name: str, batch_first: bool, device: torch.device) -> None:
    module = getattr(weft.nn, name)(
        3, 5, 2, bidirectional=True, batch_first=batch_first, device=device, dtype=torch.float64
    )
    x = torch.randn(6, 4, 3, dtype=torch.float64, device=device)
    x = x.transpose(0, 1).contiguous() if batch_first else x
    lengths = torch.tensor([2, 6, 1, 5])
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
    output, final = module(packed)
    padded, _ = pad_packed_sequence(output, batch_first)
    torch.testing.assert_close(module(x, lengths=lengths.to(device)), (padded, final))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_resets_are_separate_sequences(name: str, device: torch.device) -> None:
    """One row that restarts in its middle is two rows that begin there."""
    module = getattr(weft.nn, name)(3, 5, 2, device=device, dtype=torch.float64)
    x = torch.randn(7, 2, 3, dtype=torch.float64, device=device)
    resets = torch.zeros(7, 2, dtype=torch.bool, device=device)
    resets[3] = True
    output, final = module(x, resets=resets)
    first, _ = module(x[:3])
    second, last = module(x[3:])
    torch.testing.assert_close(output, torch.cat([first, second]))
    torch.testing.assert_close(final, last)
    module.batch_first = True
    torch.testing.assert_close(
        module(x.transpose(0, 1), resets=resets.t())[0], output.transpose(0, 1)
    )
    unbatched, _ = module(x[:, 0], resets=resets[:, 0])
    torch.testing.assert_close(unbatched, output[:, 0])
    packed = pack_padded_sequence(x, torch.tensor([5, 7]), enforce_sorted=False)
    module.batch_first = False
    padded, _ = pad_packed_sequence(module(packed, resets=resets)[0])
    torch.testing.assert_close(padded[:5], output[:5])


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_revert_refuses_variants(name: str, options: dict[str, Any]) -> None:
    """torch's layer would compute something else; but `recompute` changes no number."""
    module = torch.nn.Sequential(getattr(weft.nn, name)(3, 5, **options))
    if set(options) == {"recompute"}:
        assert type(weft.revert(module)[0]) is getattr(torch.nn, name)
        return
    with pytest.raises(ValueError, match=rf"no {name} with .*at '0'"):
        weft.revert(module)
    assert type(module[0]) is getattr(weft.nn, name)


# ---- errors --------------------------------------------------------------------------------------


def test_errors(device: torch.device) -> None:
    lstm = weft.nn.LSTM(3, 5, device=device)
    x = torch.zeros(4, 2, 3, device=device)
    packed = pack_padded_sequence(x, torch.tensor([4, 2]))

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, device=device)

    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, "got 'standart'", lambda: weft.nn.LSTM(3, 5, peephole="standart")),
        (
            ValueError,
            "exclude each other",
            lambda: weft.nn.LSTM(3, 5, peephole="previous", coupled_gates=True),
        ),
        (ValueError, "proj_size", lambda: weft.nn.LSTM(3, 5, proj_size=5)),
        (ValueError, "zoneout should be", lambda: weft.nn.GRU(3, 5, zoneout=1.5)),
        (ValueError, "recurrent_dropout should", lambda: weft.nn.RNN(3, 5, recurrent_dropout=-1)),
        (RuntimeError, "dtype int64", lambda: lstm(x, lengths=ints(1, 2).int())),
        (RuntimeError, r"lengths must be \[2\]", lambda: lstm(x, lengths=ints(1, 2, 3))),
        (RuntimeError, "dtype bool", lambda: lstm(x, resets=torch.zeros(4, 2, device=device))),
        (RuntimeError, r"resets must be \[4, 2\]", lambda: lstm(x, resets=ints(1).bool())),
        (ValueError, "has its own", lambda: lstm(packed, lengths=ints(4, 2))),
        (ValueError, "batched", lambda: lstm(x[:, 0], lengths=ints(4))),
    ]
    if device.type == "cpu":
        cases += [
            (RuntimeError, "between 0 and", lambda: lstm(x, lengths=ints(1, 5))),
            (RuntimeError, "between 0 and", lambda: lstm(x, lengths=ints(-1, 4))),
        ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
